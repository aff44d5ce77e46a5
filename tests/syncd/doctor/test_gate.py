"""What `syncd doctor` says about the gates of the gateways."""

from __future__ import annotations

from typing import Any

import pytest

from syncd.doctor.checks import Level, check_gate
from syncd.gateways.models import Gate

KONG = {"id": "0123456789abcdef", "lua": "1.0", "heard": 0.2, "passed": 10, "dict_free": 9_000_000}
LISTS = ("denied", "close", "stopped", "overrides", "denied_counts")


def gate(**parts: Any) -> Gate:
    figures = {
        "calls": parts.pop("calls", [["query", "200", 3], ["access", "200", 2]]),
        "state_age": 1.2,
        "answer_age": parts.pop("answer_age", 0.3),
        "kongs": parts.pop("kongs", [KONG]),
    }
    empty: dict[str, Any] = {key: [] for key in LISTS}
    given = {"version": "1.0", "mode": "enforce", "features": ["api"], "subjects": 2, "last_error": ""}
    return Gate.model_validate(empty | given | {"figures": figures} | parts)


def found(**parts: Any) -> list[tuple[Level, str]]:
    return [(finding.level, finding.text) for finding in check_gate("eu", gate(**parts))]


def test_a_gate_that_works_is_ok() -> None:
    assert found() == [(Level.OK, "eu: the gate is in mode enforce for 2 subjects")]
    assert "its token was not used" in found(calls=[])[0][1]


@pytest.mark.parametrize(
    ("parts", "level", "said"),
    [
        (
            {"calls": [["query", "403", 4]], "answer_age": None},
            Level.PROBLEM,
            "refuses the gate's token (query",
        ),
        (
            {"calls": [["query", "200", 4], ["access", "401", 9]]},
            Level.PROBLEM,
            "refuses the gate's token (access)",
        ),
        (
            {"answer_age": 90.0, "last_error": "ConnectError: refused"},
            Level.PROBLEM,
            "has not answered the gate for 90 s (ConnectError: refused)",
        ),
        (
            {"calls": [["query", "unreachable", 4]], "answer_age": None},
            Level.PROBLEM,
            "has not answered the gate",
        ),
        ({"denied_counts": [["api", "FEATURE_NOT_FOUND", 7]]}, Level.PROBLEM, "has no feature api, so all"),
        (
            {"denied_counts": [["api", "FEATURE_UNAVAILABLE", 1]]},
            Level.WARNING,
            "1 active customer without an entitlement to api: their requests are stopped",
        ),
        (
            {"denied_counts": [["api", "FEATURE_UNAVAILABLE", 2]], "mode": "shadow"},
            Level.WARNING,
            "2 active customers without an entitlement to api: their requests would be stopped",
        ),
        ({"kongs": []}, Level.WARNING, "no Kong asks this gate"),
        ({"kongs": [KONG | {"lua": "0.9"}]}, Level.WARNING, "version 1.0, its Lua half in Kong of 0.9"),
        ({"kongs": [KONG | {"no_memory": 1}]}, Level.WARNING, "openmeter_gate is full"),
        ({"kongs": [KONG | {"errors": 2}]}, Level.WARNING, "2 faults in the gate's Lua half"),
    ],
)
def test_what_is_wrong_with_a_gate_is_named(parts: dict[str, Any], level: Level, said: str) -> None:
    [(is_level, text)] = found(**parts)
    assert is_level is level
    assert text.startswith("eu: ")
    assert said in text


def test_a_token_that_was_refused_for_a_while_and_works_again_is_no_finding() -> None:
    calls = [["query", "403", 4], ["query", "200", 9]]
    assert [level for level, _ in found(calls=calls)] == [Level.OK]


def test_used_up_allowances_are_no_finding() -> None:
    assert [level for level, _ in found(denied_counts=[["api", "USAGE_LIMIT_REACHED", 5]])] == [Level.OK]
