"""Obstacles to deleting a customer, checked for the deletions of a plan only."""

from __future__ import annotations

import pytest

from syncd.core.changes import Change, ChangeKind, EntityState, Plan
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.metering.base import Inspection
from syncd.planning.orphans import Obstacle
from syncd.runs.passes import check_deletions
from tests.syncd.builders import OWNER


class Server:
    """Gives a fixed answer, and remembers which customers were inspected."""

    def __init__(self, answer: Inspection | Exception | None) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def inspect(self, customer_id: str) -> Inspection | None:
        self.asked.append(customer_id)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def change(kind: ChangeKind, identity: str = "C") -> Change:
    return Change(kind, "acme", ("consumer:1",), "because", identity, EntityState("ACME", ("consumer:1",)))


def obstacle(answer: Inspection | Exception | None) -> Obstacle | None:
    plan = Plan(OWNER, "sync", (change(ChangeKind.DELETE_CUSTOMER),))
    return check_deletions(plan, Server(answer)).get("C")


@pytest.mark.parametrize("found", [Inspection(), None])
def test_a_customer_on_which_nothing_depends_may_be_deleted(found: Inspection | None) -> None:
    assert obstacle(found) is None


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Inspection(entitlements=("gpt",)), "gpt"),
        (Inspection(open_subscriptions=("S1",)), "not ended (S1)"),
        (Inspection(open_invoices=("01M8",)), "invoice that is not final (01M8)"),
        (UnauthorizedError("403"), "cannot be read (403)"),
        (RefusedError("no", status=400, detail="no"), "cannot be read (no)"),
    ],
)
def test_what_depends_on_a_customer_or_cannot_be_read_rules_out_its_deletion(
    found: Inspection | Exception, says: str
) -> None:
    there = obstacle(found)
    assert there is not None
    assert says in there.reason
    # What billing keeps waits by design; what cannot be read is for people to mend.
    assert there.settled is isinstance(found, Inspection)


def test_only_deletions_are_checked_and_of_very_many_only_the_first() -> None:
    server = Server(Inspection(entitlements=("gpt",)))
    others = tuple(change(kind, kind) for kind in ChangeKind if kind is not ChangeKind.DELETE_CUSTOMER)
    many = tuple(change(ChangeKind.DELETE_CUSTOMER, str(number)) for number in range(120))
    check_deletions(Plan(OWNER, "sync", (*others, *many)), server)
    assert server.asked == [str(number) for number in range(100)]
