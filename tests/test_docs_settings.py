"""A setting or a variable that a page speaks of is one that exists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.gate.settings import Metering
from openmeter_plugin.http_log.config import HttpLogSettings
from tests.documents import PAGES, ROOT, prose
from tests.syncd_settings import sections


def of_syncd() -> set[str]:
    return {
        ".".join(setting.place).replace(".0", "[]")
        for settings in sections().values()
        for setting in settings
    }


def of_the_plugin(fields: Iterable[dict[str, Any]] = FIELDS, before: str = "") -> set[str]:
    found = set()
    for name, described in (item for field in fields for item in field.items()):
        found.add(before + name)
        found |= of_the_plugin(described.get("fields", ()), f"{before}{name}.")
    return found


THERE = of_syncd() | of_the_plugin() | {f"http_log.{name}" for name in HttpLogSettings.model_fields}
THERE |= {f"metering.{name}" for name in Metering.model_fields}  # of the gate
SECTIONS = {name.split(".")[0] for name in THERE if "." in name}


@pytest.mark.parametrize("page", PAGES)
def test_a_setting_that_is_written_with_its_section_exists(page: str) -> None:
    written = set(re.findall(r"`([a-z_]+(?:\[\])?(?:\.[a-z_]+)+)", prose(ROOT / page)))
    assert {name for name in written if name.split(".")[0] in SECTIONS} - THERE == set()


def test_there_are_settings_to_check() -> None:
    text = " ".join(prose(ROOT / page) for page in PAGES)
    assert len(set(re.findall(r"`([a-z_]+(?:\[\])?(?:\.[a-z_]+)+)", text)) & THERE) > 25


def code() -> str:
    folders = ("plugin", "syncd", "docs/examples")
    files = [
        ROOT / "docker-compose.yml",
        *(path for folder in folders for path in (ROOT / folder).rglob("*")),
    ]
    return "".join(path.read_text() for path in files if path.suffix in {".py", ".yml", ".yaml", ".service"})


def test_a_variable_that_a_page_speaks_of_is_read_somewhere() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    source = code()
    for name in sorted(set(re.findall(r"\b(?:OPENMETER_PLUGIN|SYNCD)_[A-Z0-9_]+\b", text))):
        place = name.removeprefix("SYNCD_").lower().split("__")
        as_setting = ".".join(place).replace(".0", "[]")
        known = name.startswith("SYNCD_") and any(there.startswith(as_setting) for there in of_syncd())
        assert known or f'"{name}"' in source or f"{{{name}" in source, name
