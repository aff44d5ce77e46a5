"""What the release workflow asks: ``check TAG`` whether all files agree, ``notes TAG`` for its text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import yaml

from openmeter_plugin import __version__
from tests.packaging.distributions import ROOT

CHANGELOG: Final = ROOT / "CHANGELOG.md"
_CHART: Final = "docs/examples/helm/kong-openmeter/Chart.yaml"
_SECTION: Final = re.compile(r"^## \[([^]]+)\](?: - (\S+))?.*$", re.MULTILINE)
_LABEL: Final = re.compile(r'org\.opencontainers\.image\.version="([^"]+)"')


def faults(tag: str, root: Path = ROOT) -> list[str]:
    """Return why a tag cannot be released; nothing if it can."""
    version = tag.removeprefix("v")
    found = []
    if tag != f"v{__version__}":
        found.append(f"the tag is {tag}, the project's version {__version__}")
    chart = yaml.safe_load((root / _CHART).read_text())
    found += [
        f"{_CHART}: {key} is {chart[key]}" for key in ("version", "appVersion") if chart[key] != version
    ]
    for name in ("plugin/Dockerfile", "syncd/Dockerfile"):
        if _LABEL.findall((root / name).read_text()) != [version]:
            found.append(f"{name}: its label names another version")
    changelog = sections((root / "CHANGELOG.md").read_text())
    date, text = changelog.get(version, ("", ""))
    if not text:
        found.append(f"CHANGELOG.md has no section [{version}], or an empty one")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"CHANGELOG.md: the section [{version}] has no date")
    if changelog.get("Unreleased", ("", ""))[1]:
        found.append("CHANGELOG.md: lines under [Unreleased] belong to this release or to none")
    return found


def sections(changelog: str) -> dict[str, tuple[str, str]]:
    """Return date and text of each section, by version."""
    heads = list(_SECTION.finditer(changelog))
    ends = [head.start() for head in heads[1:]] + [len(changelog)]
    return {
        head[1]: (head[2] or "", changelog[head.end() : end].strip())
        for head, end in zip(heads, ends, strict=True)
    }


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit status."""
    match arguments:
        case ["check", tag]:
            found = faults(tag)
            print("\n".join(found) if found else f"{tag} can be released")
            return 1 if found else 0
        case ["notes", tag]:
            print(sections(CHANGELOG.read_text())[tag.removeprefix("v")][1])
            return 0
        case _:
            print("usage: python -m tests.packaging.release check|notes TAG", file=sys.stderr)
            return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
