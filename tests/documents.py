"""The documentation as data (blocks, links, headings), and a fresh copy of the project to run commands in.

A fenced block `sh` is run unless the line before it is `<!-- not run: reason -->`. A comment
`# exit status N` behind a command says how it ends, 0 where there is none; a command that ends with `&` is
waited for until it listens. A block after `<!-- printed -->` must be among what the commands printed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = tuple(
    sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))
)
PORTS: Final = {"sandbox": "8888", "http-log": "8095", "run": "8890", "other": "8889"}
"""The ports that commands and examples name, each replaced by a free one."""

_BLOCK: Final = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>[^\n]+)|(?P<printed>printed)) -->\n)?"
    r"```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_STATUS: Final = re.compile(r"#\s*exit status (\d+)")
_SECONDS: Final = 150


@dataclass(frozen=True)
class Block:
    """A fenced block, why it is not run where it is not, and whether it shows what was printed."""

    page: str
    kind: str
    text: str
    reason: str | None
    printed: bool


def blocks(page: str, kind: str | None = None) -> list[Block]:
    """Return the blocks of a page, of one kind if asked for."""
    found = [
        Block(page, m["kind"], m["text"], m["reason"], bool(m["printed"]))
        for m in _BLOCK.finditer((ROOT / page).read_text())
    ]
    return [block for block in found if kind in (None, block.kind)]


def commands(page: str) -> list[str]:
    """Return the commands of a page that are run, in order."""
    text = "".join(block.text for block in blocks(page, "sh") if block.reason is None)
    return text.replace("\\\n", " ").splitlines()


def anchors(page: Path) -> set[str]:
    """Return what links to headings of the page may name, as GitHub makes it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield file ("" for the page itself) and anchor of each link that leads into the repository."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


@dataclass(frozen=True)
class Copy:
    """The project as after a clone and `make setup`; the environment is the one that runs the tests."""

    folder: Path
    ports: dict[str, str]

    @classmethod
    def make(cls, folder: Path) -> Copy:
        """Copy what a clone would have, with ports of its own in the examples."""
        ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored))
        environment = folder / ".venv"
        environment.mkdir()
        for entry in Path(sys.prefix).iterdir():
            if entry.name != ".ready":
                (environment / entry.name).symlink_to(entry)
        (environment / ".ready").touch()
        copy = cls(folder, {named: _free_port() for named in PORTS.values()})
        for example in (folder / "docs" / "examples").glob("*.yaml"):
            example.write_text(copy.with_its_ports(example.read_text()))
        return copy

    @property
    def environment(self) -> dict[str, str]:
        """The variables for a process in it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCD_", "OPENMETER_", "MAKE"))}
        return kept | {
            "PYTHONPATH": f"{self.folder / 'plugin'}:{self.folder}",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "STATE_DIRECTORY": str(self.folder / "state"),
        }

    def with_its_ports(self, text: str) -> str:
        """Return the text with the documentation's ports replaced."""
        return re.sub(r"(?<=[: ])(" + "|".join(self.ports) + r")\b", lambda match: self.ports[match[1]], text)

    def run(self, lines: list[str]) -> str:
        """Run the commands in order, fail at the first that ends otherwise; return what they printed."""
        log = self.folder.parent / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", self.script(lines)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, f"{output}\n{log.read_text()}"
        return output

    def script(self, lines: list[str]) -> str:
        """Return a script that ends at the first command whose exit status is not the one behind it."""
        script = [
            "trap 'kill $(jobs -p) 2>/dev/null' EXIT",
            "is_open() { (: </dev/tcp/127.0.0.1/$1) 2>/dev/null; }",
            "listening() { for _ in {1..300}; do is_open $1 && return; sleep 0.05; done; exit 99; }",
            'must() { [ "$1" = "$2" ] || { echo "$3: ended with $1, not $2" >&2; exit 98; }; }',
        ]
        for line in lines:
            status = _STATUS.search(line)
            script.append(self.with_its_ports(line))
            if line.endswith("&"):
                # Whoever reads on before typing gives it that time.
                script.append(f"listening {self._port_of(line)}")
            else:
                script.append(f"must $? {status[1] if status else 0} {shlex.quote(line)}")
        return "\n".join([*script, "wait", ""])

    def _port_of(self, line: str) -> str:
        named = next((port for port in self.ports if re.search(rf"[: ]{port}\b", line)), PORTS["run"])
        return self.ports[named]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
