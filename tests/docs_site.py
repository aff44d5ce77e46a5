"""The MkDocs hook of mkdocs.yml: pages from outside docs/, links that lead there, folders in the navigation.

The Markdown files are written for a reader of the repository. In the site, README.md is the first page, the
other Markdown files of the top level are pages too, and every other file that a page links to is copied below
`repository/`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
TOP_LEVEL: Final = {path.name: path.name.lower().replace("_", "-") for path in ROOT.glob("*.md")} | {
    "README.md": "index.md",
    "SECURITY.md": "security-policy.md",  # docs/security.md is another page
}
"""The page of the site that each Markdown file of the top level becomes."""

_FENCED: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(
    r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?P<target>(?![a-z]+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)
_FILES: Final = "repository"


def on_config(config: Any) -> Any:
    """Replace `folder/*.md` in the navigation by the folder's pages; leave out an empty one."""
    config.nav = list(_expanded(config.nav, Path(config.docs_dir)))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top level, and the files that pages link to."""
    from mkdocs.structure.files import File, InclusionLevel

    docs = Path(config.docs_dir)
    pages = {name: (ROOT / name).read_text() for name in TOP_LEVEL}
    # Those that mkdocs.yml does not list are still pages, which others may link to.
    listed = set(_listed(config.nav))
    for name, place in TOP_LEVEL.items():
        inclusion = InclusionLevel.INCLUDED if place in listed else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, content=pages[name], inclusion=inclusion))
    pages |= {f"docs/{path.relative_to(docs).as_posix()}": path.read_text() for path in docs.rglob("*.md")}
    for target in sorted({target for source, text in pages.items() for target in _linked(source, text)}):
        if not target.startswith("docs/") and target not in TOP_LEVEL and (ROOT / target).is_file():
            place = f"{_FILES}/{target}"
            source = str(ROOT / target)
            level = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place, abs_src_path=source, inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite the links of a page for its place in the site."""
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """Return a page of the site with its links leading to pages and files of the site.

    A link to a folder outside docs/ becomes plain text: a site has no page for it.
    """
    source = next((name for name, made in TOP_LEVEL.items() if made == page), f"docs/{page}")
    source = source.removeprefix(f"docs/{_FILES}/")

    def link(match: re.Match[str]) -> str:
        target = _resolved(source, match["target"])
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif target in TOP_LEVEL:
            place = TOP_LEVEL[target]
        elif (ROOT / target).is_dir():
            return match["text"]
        else:
            place = f"{_FILES}/{target}"
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"

    return _outside_blocks(markdown, lambda text: _LINK.sub(link, text))


def _linked(source: str, markdown: str) -> Iterator[str]:
    for match in _LINK.finditer(_FENCED.sub("", markdown)):
        yield _resolved(source, match["target"])


def _resolved(source: str, target: str) -> str:
    """Return the path in the repository that a link in one of its files leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _outside_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a change to everything but the fenced blocks."""
    blocks = _FENCED.findall(markdown)
    parts = _FENCED.split(markdown)
    changed = [change(part) for part in parts]
    return "".join(part + block for part, block in zip(changed, [*blocks, ""], strict=True))


def _listed(nav: Any) -> Iterator[str]:
    """Yield every page that a navigation lists."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _listed(entry)


def _expanded(nav: list[Any], docs: Path) -> Iterator[Any]:
    for entry in nav:
        if not isinstance(entry, dict):
            yield entry
            continue
        ((title, inner),) = entry.items()
        if isinstance(inner, str) and inner.endswith("/*.md"):
            found = sorted(docs.glob(inner), key=lambda path: (path.name != "index.md", path.name))
            inner = [path.relative_to(docs).as_posix() for path in found]
        elif isinstance(inner, list):
            inner = list(_expanded(inner, docs))
        if inner:
            yield {title: inner}
