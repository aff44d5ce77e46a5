"""The documentation as data: blocks, commands, links, headings.

A fenced block `sh` is run by a test, in order, in a clone (`tests.clones`). The line before it may say more:

    <!-- not run: reason -->   it is checked and not run; reasons are Docker, Kubernetes and the like
    <!-- on a host -->         it is run by a test of its own, the host's folders (/opt, /run ...) elsewhere
    <!-- printed -->           the block is no command, but among what the commands print

A comment `# exit status N` behind a command says how it ends, 0 where there is none; a command that ends with
`&` is waited for until it listens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = tuple(
    sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
)

_BLOCK: Final = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>[^\n]+)|(?P<printed>printed)|(?P<host>on a host)) -->\n)?"
    r"```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FENCED: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; why it is not run, whether it shows what was printed, whether it is for a host."""

    page: str
    kind: str
    text: str
    reason: str | None
    printed: bool
    on_host: bool

    @property
    def lines(self) -> list[str]:
        """Its commands."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page: str, kind: str | None = None) -> list[Block]:
    """Return the blocks of a page, of one kind if asked for."""
    found = [
        Block(page, m["kind"], m["text"], m["reason"], bool(m["printed"]), bool(m["host"]))
        for m in _BLOCK.finditer((ROOT / page).read_text())
    ]
    return [block for block in found if kind in (None, block.kind)]


def commands(page: str, *, on_host: bool = False) -> list[str]:
    """Return the commands of a page that are run, in order: those for the clone, or those for a host."""
    return [
        line
        for block in blocks(page, "sh")
        if block.reason is None and block.on_host == on_host
        for line in block.lines
    ]


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return what links to headings of the page may name, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield file ("" for the page itself) and anchor of each link that leads into the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor
