"""What a real Kong 3.9.1 answered with the gate in it (tests/data/kong-wire/gate.json), and the stand-in."""

from __future__ import annotations

import json
import re
from pathlib import Path
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


FAILURES: Final[dict[str, Any]] = json.loads((WIRE / "gate-failures.json").read_text())
RESET: Final = 1_800_003_600


def fail(node: Node, gate: ScriptedGate, what: str) -> None:
    """Have the failure of a recording happen; processes that Kong does not talk to change nothing here."""
    if what in ("the gate is killed", "the supervisor is killed", "the plugin server is restarted"):
        gate.state = "dead"
    elif what in ("the gate hangs", "all of them hang"):
        gate.state = "hung"
    elif what == "kong reload":
        node.reload()
    elif what == "nginx workers are killed":
        node.kill(0)
        node.kill(1)
    elif what == "readings are too old, allow":
        gate.allow("payer")
        gate.allow("spent")
    elif what == "readings are too old, deny":
        gate.deny("payer", "STALE")
        gate.deny("spent", "STALE")
    elif what == "Kong is restarted, without the gate":
        gate.state = "dead"
        node.restart()


@pytest.mark.parametrize("what", FAILURES)
def test_the_stand_in_answers_as_a_real_kong_did_when_something_failed(
    gate: ScriptedGate, shell: Shell, what: str, tmp_path: Path
) -> None:
    gate.settings = settings(max_stale="300")
    gate.allow("payer", 10_000_000, reset=RESET, quota=10_000_000)
    gate.deny("spent", "USAGE_LIMIT_REACHED")
    path = tmp_path / "gate.sock"
    if shell == "plugin":  # in the recorded Kong both had one dict, which the plugin filled from this file
        path.with_name("gate.sock.state").write_text(gate.feed())
    elif what == "Kong is restarted, without the gate":
        return
    entries = None if what == "the shared dict is missing" else 10_000
    node = Node(gate, shell=shell, path=str(path), entries=entries)
    for worker in range(2):
        node.request("nobody", worker=worker)
    node.run(1)
    fail(node, gate, what)
    node.run(8)
    for name, recorded in FAILURES[what][shell].items():
        answer = node.request(name)
        found = {
            "status": answer.status,
            "headers": sorted(header.lower() for header in answer.headers),
            "reason": answer.reason,
        }
        assert found == recorded
