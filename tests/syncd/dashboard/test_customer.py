"""What the page of a customer shows of its subjects, its gates and its history."""

from __future__ import annotations

from typing import Any

from syncd.customers.known import KnownCustomer, Name
from syncd.dashboard.customer_table import gate_lines, past_changes, subject_rows, subject_table
from syncd.gateways.models import Gate

ACME = KnownCustomer("01A", "acme", "Acme", ("consumer:1", "shared"), "syncd")
ALICE = Name("consumer", "1", "alice", "crm-9", ("gold", "eu"), "kong")
MEMBERS = [Name("consumer", str(n), f"member-{n}", None, ("gold",), "kong") for n in range(5)]
METERS = (("requests", "Requests"), ("tokens", "Tokens"))


def test_a_subject_has_the_names_behind_it_and_its_usage() -> None:
    alice, shared, key = subject_rows(
        ACME,
        ({"consumer:1": 3, "acme": 2}, {"consumer:1": 50}),
        {"consumer:1": [ALICE], "shared": MEMBERS},
    )
    assert (alice.text, alice.custom_ids, alice.tags, alice.values) == (
        "alice",
        "crm-9",
        ("gold", "eu"),
        (3, 50),
    )
    assert (alice.kinds, alice.is_own_key) == ("consumer, kong", False)
    assert shared.text == "member-0, member-1, member-2 and 2 more"
    assert (shared.tags, shared.values) == (("gold",), (0, 0))
    assert (key.key, key.is_own_key, key.text, key.values) == ("acme", True, None, (2, 0))


def test_a_principal_without_a_username_is_called_by_what_it_has() -> None:
    nameless = [Name("consumer", "7", None, "crm", (), "k"), Name("consumer", "8", None, None, (), "k")]
    assert [name.text for name in nameless] == ["crm", "8"]


def test_subjects_are_searched_by_name_custom_id_and_tag() -> None:
    found = subject_rows(ACME, ({}, {}), {"consumer:1": [ALICE], "shared": MEMBERS})
    for text, keys in (
        ("CRM-9", ["consumer:1"]),
        ("member-4", ["shared"]),
        ("gold", ["consumer:1", "shared"]),
    ):
        view = subject_table(METERS).view(found, {"q": text, "sort": "subject"})
        assert [row.key for row in view.rows] == keys, text


def a_gate(**changes: Any) -> Gate:
    figures = {"calls": [], "state_age": 1, "answer_age": 1, "kongs": []}
    empty: dict[str, Any] = {
        "version": "0",
        "mode": "enforce",
        "features": ["api"],
        "subjects": 1,
        "denied": [],
        "denied_counts": [],
        "close": [],
        "stopped": [],
        "overrides": [],
        "figures": figures,
        "last_error": "",
    }
    return Gate.model_validate({**empty, **changes})


def key_of(account: str, *subjects: str, reason: str | None = None) -> dict[str, Any]:
    return {
        "account": account,
        "subjects": list(subjects),
        "feature": "api",
        "reason": reason,
        "left": 1.0,
        "quota": 10.0,
        "reset": 0.0,
    }


def test_a_gate_is_asked_for_this_customer_only() -> None:
    gate = a_gate(
        denied=[
            key_of("01A", reason="USAGE_LIMIT_REACHED"),
            key_of("01B", "bob", reason="USAGE_LIMIT_REACHED"),
        ],
        close=[key_of("unknown", "consumer:1"), key_of("01B", "bob")],
        overrides=[
            {"subject": "consumer:1", "until": 1.0, "why": "trial", "by": "ops"},
            {"subject": "bob", "until": 1.0, "why": "", "by": ""},
        ],
    )
    lines, overrides = gate_lines(ACME, [("eu", gate), ("us", None)])
    assert [(line.gateway, line.key.account, line.key.reason) for line in lines] == [
        ("eu", "01A", "USAGE_LIMIT_REACHED"),
        ("eu", "unknown", None),
    ]
    assert [(one.gateway, one.override.why) for one in overrides] == [("eu", "trial")]


def test_a_past_change_says_what_when_and_how_it_ended() -> None:
    document = {
        "at": "2026-11-29T12:00:00+00:00",
        "run": "abc",
        "status": "blocked",
        "detail": "409",
        "change": {"kind": "attach-subjects", "subject_keys": ["s"], "reason": "new in this customer"},
    }
    (change,) = past_changes([document])
    assert (change.kind, change.status, change.detail, change.subjects, change.run_id) == (
        "attach-subjects",
        "blocked",
        "409",
        ("s",),
        "abc",
    )
