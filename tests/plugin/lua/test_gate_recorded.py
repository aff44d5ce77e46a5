"""What a real Kong 3.9.1 answered with the gate in it (tests/data/kong-wire/gate.json), and the stand-in."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import pytest

from openmeter_plugin.config.gate_lua import gate_schema
from tests.harness.recordings import WIRE
from tests.plugin.lua.gate_node import Node, Shell
from tests.plugin.lua.scripted_gate import STATUSES, ScriptedGate, settings

RECORDED: Final[dict[str, list[dict[str, Any]]]] = json.loads((WIRE / "gate.json").read_text())


def test_the_stand_in_answers_as_a_real_kong_did(gate: ScriptedGate, shell: Shell) -> None:
    gate.settings = settings(on_stale="deny", max_stale="4")
    gate.allow("two left", 2, quota=10)
    gate.allow("no limit")
    for reason in STATUSES:
        gate.deny(reason, reason)
    node = Node(gate, shell=shell, workers=1)
    node.request("nobody")
    node.run(1.5)
    answers = [one for one in RECORDED["answers"] if one["shell"] == shell]
    assert len(answers) == 10
    for recorded in answers:
        if recorded["what"] == "STALE":
            gate.state = "dead"
            node.run(6)
        answer = node.request("no limit" if recorded["what"] == "STALE" else recorded["what"])
        body = None if answer.passed else {"message": answer.message, "reason": answer.reason}
        headers = {name.lower(): value for name, value in answer.headers.items()}
        assert [answer.status, headers, body, answer.mark] == [
            recorded[name] for name in ("status", "headers", "body", "openmeter_gate")
        ]


@pytest.mark.parametrize("recorded", RECORDED["admin"], ids=lambda one: json.dumps(one["config"]))
def test_the_schema_has_what_kong_said_of_a_configuration(recorded: dict[str, Any]) -> None:
    described: dict[str, Any] = {}
    for field in gate_schema()["fields"][1]["config"]["fields"]:
        described |= field
    for name, value in recorded["config"].items():
        said = (recorded["fields"] or {}).get(name)
        assert (faults(described.get(name), value) or None) == said


def faults(field: dict[str, Any] | None, value: Any) -> Any:
    """Return what Kong says of a value, as far as this schema needs it."""
    if field is None:
        return "unknown field"
    if "one_of" in field and value not in field["one_of"]:
        return f"expected one of: {', '.join(field['one_of'])}"
    if len(value) < field.get("len_min", 0):
        return f"length must be at least {field['len_min']}"
    match = field.get("match_any")
    if match and not any(re.search(pattern, value) for pattern in match["patterns"]):
        return match["err"]
    inner = [faults(field["elements"], item) for item in value] if "elements" in field else []
    return [one for one in inner if one]
