"""The replayer sees a difference where there is one, and none where only ids, times and words differ."""

from typing import Any

import httpx
import pytest

from tests.syncd.contract.recordings import Exchange
from tests.syncd.contract.replay import Replay

ONE, OTHER = "01M8HR1JDKQ044VK14HCTP37G4", "01M8HR1JE2VZ22R9RAQKF479GV"
OURS = "01M8J6123ERW1JE0S3K7ZZ524J"
RECORDED = {"id": ONE, "name": "alice", "createdAt": "2026-11-28T18:52:52.531239Z", "subjects": ["a"], "n": 1}


def differences(
    recorded: Any, given: Any, *, status: int = 200, path: str = "/api/v1/customers"
) -> list[str]:
    exchange = Exchange(
        "file", "name", "GET", path, {}, None, 200, {"Content-Type": "application/json"}, recorded
    )
    with httpx.Client() as client:
        return Replay(client).differences(exchange, httpx.Response(status, json=given))


def test_ids_and_times_may_differ() -> None:
    assert differences(RECORDED, RECORDED | {"id": OURS, "createdAt": "2030-01-01T00:00:00Z"}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"id": "alice"},
        {"name": "bob"},
        {"createdAt": "yesterday"},
        {"subjects": ["a", "b"]},
        {"subjects": "a"},
        {"n": 1.0},
        {"extra": None},
    ],
)
def test_another_value_type_or_key_is_a_difference(change: dict[str, Any]) -> None:
    assert len(differences(RECORDED, RECORDED | change)) == 1


def test_a_missing_key_and_another_status_are_differences() -> None:
    assert differences(RECORDED, {name: RECORDED[name] for name in RECORDED if name != "n"}) == [
        ".n is missing"
    ]
    assert differences(RECORDED, RECORDED, status=201)


def test_one_recorded_id_is_one_id_here() -> None:
    assert differences([ONE, ONE], [OURS, OURS]) == []
    assert differences([ONE, OTHER, ONE], [OURS, OTHER, OTHER])


def test_a_reason_may_be_worded_otherwise_but_has_to_be_there() -> None:
    assert differences({"detail": "one"}, {"detail": "another"}) == []
    assert differences({"detail": "one"}, {"detail": ""})


def test_only_what_has_no_order_may_come_in_another() -> None:
    assert differences(["a", "b"], ["b", "a"], path="/api/v1/subjects") == []
    assert differences(["a", "b"], ["b", "a"])
    assert differences(["a", "b"], ["b", "c"], path="/api/v1/subjects")
