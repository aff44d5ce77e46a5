"""Segments that the Lua plugin wrote in a real Kong 3.9.1, against what kong.log.serialize returned there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from openmeter_plugin.config.instance_config import parse_config
from tests.plugin.lua.equality import CONFIG, RULES, differences
from tests.plugin.lua.stand_in import checked, lines, records

RECORDED: Final = Path(__file__).parents[2] / "data/kong-segments"


def logs() -> list[bytes]:
    return (RECORDED / "logs.jsonl").read_bytes().splitlines()


def test_each_recorded_record_makes_the_events_of_the_log_of_its_request() -> None:
    assert len(logs()) > 100
    assert differences(logs(), lines(RECORDED)) == []


def test_the_comparison_sees_a_record_that_differs_and_one_that_is_missing() -> None:
    first, *others = lines(RECORDED)
    changed = first.replace(b'"method":"GET"', b'"method":"PUT"')
    assert changed != first
    assert len(differences(logs(), [changed, *others])) == 1
    assert len(differences(logs(), others)) == 1
    assert len(differences(logs()[1:], [first, *others])) == 1


def test_no_recorded_segment_holds_a_secret() -> None:
    content = b"".join(file.read_bytes() for file in RECORDED.glob("*.segment"))
    for secret in (b"a-consumers-key", b"the-token-of-the-metering-api", b"a prompt", b"authorization"):
        assert secret not in content


def test_the_recorded_instance_is_the_configuration_that_kong_was_given() -> None:
    ids = {record["i"] for record in records(RECORDED)}
    files = {file.stem: file for file in (RECORDED / "instances").glob("*.json")}
    assert set(files) == ids
    for name, file in files.items():
        described = json.loads(checked(file.read_bytes().removesuffix(b"\n")))
        assert described["id"] == name
        assert parse_config(described["config"])[1] == RULES
        assert {key: described["config"][key] for key in CONFIG if key != "subject"} == {
            key: value for key, value in CONFIG.items() if key != "subject"
        }
