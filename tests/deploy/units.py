"""The systemd units of docs/examples/systemd, read as far as the tests need them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.deploy.files import ROOT

SYSTEMD: Final = ROOT / "docs" / "examples" / "systemd"
BIN: Final = "/opt/kong-openmeter/bin"

Unit = dict[str, dict[str, list[str]]]
"""Section, key, values. A drop-in's empty value takes away what came before, as systemd has it."""


def unit(name: str, *drop_ins: str) -> Unit:
    """Return a unit with some of its drop-ins."""
    found: Unit = {}
    for path in (SYSTEMD / name, *(SYSTEMD / f"{name}.d" / drop_in for drop_in in drop_ins)):
        section: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            if line.startswith("["):
                section = found.setdefault(line.strip("[]"), {})
                continue
            key, equals, value = line.partition("=")
            assert equals, f"{path.name}: {line}"
            if value:
                section.setdefault(key, []).append(value)
            else:
                section[key] = []
    return found


def one(found: Unit, key: str, section: str = "Service") -> str:
    """Return the only value of a key."""
    (value,) = found[section][key]
    return value


def with_other_places(target: Path, places: dict[str, str]) -> list[Path]:
    """Copy all units into a folder, other paths in them; returns the units."""
    for path in SYSTEMD.rglob("*.*"):
        if path.suffix in {".service", ".socket", ".conf"}:
            text = path.read_text()
            for old, new in places.items():
                text = text.replace(old, new)
            copy = target / path.relative_to(SYSTEMD)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(text)
    return sorted(path for path in target.glob("*.*") if path.suffix in {".service", ".socket"})
