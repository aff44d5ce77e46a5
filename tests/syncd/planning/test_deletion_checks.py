"""Obstacles to deleting a customer, checked for the deletions of a plan only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from syncd.core.changes import Change, ChangeKind, EntityState, Plan
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.core.model import CustomerDetails, Principal
from syncd.core.ownership import ownership_metadata
from syncd.mapping.rules import Assignment, MappingRules, Templates
from syncd.metering.base import Inspection
from syncd.planning.deletion_checks import check_deletions
from tests.syncd.builders import OWNER, consumer, static

RULES = MappingRules(OWNER, "tag", templates=Templates("{subject}", email="{username}@x.example"))
ALICE = consumer("1", "alice", "customer:acme")
DETAILS = CustomerDetails("alice@x.example", metadata=ownership_metadata(OWNER, "1"))
UNTOUCHED = Inspection("alice", DETAILS, subscriptions={})


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


def change(kind: ChangeKind, subject: str = "consumer:1", identity: str = "C") -> Change:
    return Change(kind, subject, (subject,), "because", identity, EntityState("alice", (subject,)))


def why_undeletable(
    answer: Inspection | Exception | None,
    *principals: Principal,
    kind: ChangeKind = ChangeKind.RETIRE_CUSTOMER,
    rules: MappingRules = RULES,
) -> str | None:
    plan = Plan(OWNER, "sync", (change(kind),))
    return check_deletions(plan, Server(answer), principals or (ALICE,), rules).undeletable.get("C")


def test_a_customer_that_is_as_syncd_created_it_may_be_deleted() -> None:
    assert why_undeletable(UNTOUCHED) is None
    assert why_undeletable(None) is None


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (replace(UNTOUCHED, name="Alice GmbH"), "name"),
        (replace(UNTOUCHED, details=replace(DETAILS, email="pay@alice.example")), "email"),
        (replace(UNTOUCHED, details=replace(DETAILS, currency="EUR")), "currency"),
        (replace(UNTOUCHED, details=replace(DETAILS, description="Ask Jane")), "description"),
        (replace(UNTOUCHED, details=replace(DETAILS, billing_address={"country": "DE"})), "billing address"),
        (replace(UNTOUCHED, details=replace(DETAILS, metadata={"crm": "7"})), "metadata"),
        (replace(UNTOUCHED, entitlements=("gpt",)), "gpt"),
        (replace(UNTOUCHED, subscriptions={"S1": "inactive"}), "has had a subscription (S1)"),
        (replace(UNTOUCHED, subscriptions={"S1": "scheduled"}), "not ended (S1)"),
        (replace(UNTOUCHED, others=("an account with stripe", "credits")), "stripe and credits"),
        (UnauthorizedError("403"), "cannot be read (403)"),
        (RefusedError("no", status=400, detail="no"), "cannot be read (no)"),
    ],
)
def test_anything_that_people_or_billing_added_rules_out_a_retirement(
    found: Inspection | Exception, says: str
) -> None:
    assert says in (why_undeletable(found) or "")


def test_a_detail_that_people_removed_does_not_rule_it_out() -> None:
    assert why_undeletable(replace(UNTOUCHED, details=CustomerDetails())) is None


def test_a_customer_whose_principal_is_unknown_stays() -> None:
    assert "its principal is unknown" in (why_undeletable(UNTOUCHED, consumer("2", "bob")) or "")


def test_a_row_of_the_mapping_file_that_now_groups_it_changes_nothing() -> None:
    row = Assignment("consumer", "line 2", id="1", customer="acme", name="ACME Ltd")
    assert why_undeletable(UNTOUCHED, rules=replace(RULES, group_by="file", assignments=(row,))) is None


@pytest.mark.parametrize(
    "principal", [static("consumer:1", customer="acme"), consumer("9", "consumer:1", "customer:acme")]
)
def test_a_principal_is_found_by_the_field_that_its_subject_comes_from(principal: Principal) -> None:
    rules = MappingRules(OWNER, "tag", "username", templates=Templates("{subject}"))
    name = principal.username or principal.id
    assert why_undeletable(Inspection(name, subscriptions={}), principal, rules=rules) is None


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (replace(UNTOUCHED, name="Alice GmbH", others=("credits",)), None),
        (replace(UNTOUCHED, subscriptions={"S1": "inactive"}), None),
        (replace(UNTOUCHED, subscriptions={"S1": "inactive", "S2": "scheduled"}), "S2"),
        (replace(UNTOUCHED, entitlements=("gpt",)), "gpt"),
    ],
)
def test_after_a_grace_period_only_entitlements_and_open_subscriptions_rule_out_a_deletion(
    found: Inspection, says: str | None
) -> None:
    why = why_undeletable(found, kind=ChangeKind.DELETE_CUSTOMER)
    assert (says in why) if says and why else why is says


def test_only_deletions_are_checked_and_of_very_many_only_the_first() -> None:
    server = Server(replace(UNTOUCHED, entitlements=("gpt",)))
    others = tuple(change(kind, identity=kind) for kind in ChangeKind if "customer" not in kind)
    many = tuple(change(ChangeKind.DELETE_CUSTOMER, identity=str(number)) for number in range(120))
    check_deletions(Plan(OWNER, "sync", (*others, *many)), server, (ALICE,), RULES)
    assert server.asked == [str(number) for number in range(100)]


def test_the_plan_keeps_the_details_of_a_retired_customer() -> None:
    plan = Plan(OWNER, "sync", (change(ChangeKind.RETIRE_CUSTOMER), change(ChangeKind.BLOCKED)))
    again = check_deletions(plan, Server(UNTOUCHED), (ALICE,), RULES).with_details(plan)
    (retired, other) = again.changes
    assert retired.before == EntityState("alice", ("consumer:1",), None, CustomerDetails("alice@x.example"))
    assert other == plan.changes[1]


@pytest.mark.parametrize("kind", [ChangeKind.RETIRE_CUSTOMER, ChangeKind.DELETE_CUSTOMER])
def test_an_invoice_that_is_not_final_rules_out_a_deletion(kind: ChangeKind) -> None:
    invoiced = replace(UNTOUCHED, open_invoices=("01M8",))
    assert "invoice that is not final (01M8)" in str(why_undeletable(invoiced, kind=kind))
