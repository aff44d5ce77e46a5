"""What syncd may do, in rules of its own: from the documentation, not from the planner.

`faults_of_write` judges one write by what was true when it was made, and by what the plan had announced.
`unexplained` judges what a plan leaves open once nothing fails any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.ownership import ADOPTED, CUSTOMER_GROUP, MANAGED_BY, RESERVED_KEYS, SOURCE_ID, SYNC_OWNER
from syncd.core.policy import Policy
from syncd.runs.options import RunOptions
from tests.syncd.model.api import Write
from tests.syncd.model.kong import Consumer
from tests.syncd.model.truth import Customer, Entity, Truth

DETACH_AFTER, DELETE_AFTER = timedelta(days=1), timedelta(days=2)
OWNERSHIP = {MANAGED_BY, SYNC_OWNER, SOURCE_ID, ADOPTED, CUSTOMER_GROUP}
_MARK = re.compile(r"\d{8}T\d{6}Z")


@dataclass(frozen=True)
class Circumstances:
    """What one run knew and was allowed."""

    plan: Plan | None
    options: RunOptions
    policy: Policy
    key: str
    now: datetime
    consumers: Mapping[str, Consumer]

    def customer_of(self, consumer: Consumer) -> str:
        return consumer.group or self.key.format(subject=consumer.subject, kind="consumer", id=consumer.id)

    def wanted(self) -> dict[str, str]:
        """Return the key of the customer that each subject belongs to."""
        return {one.subject: self.customer_of(one) for one in self.consumers.values()}

    def changes(self, *kinds: ChangeKind) -> list[Change]:
        found = self.plan.changes if self.plan else ()
        return [change for change in found if change.kind in kinds]

    def announced(self, kind: ChangeKind, customer: Customer, subject: str | None = None) -> bool:
        return any(
            (
                change.customer_id == customer.id
                or (change.customer_id is None and change.customer_key == customer.key)
            )
            and (subject is None or subject in change.subject_keys)
            for change in self.changes(kind)
        )


def faults_of_write(write: Write, run: Circumstances) -> Iterator[str]:
    """Yield what is wrong with a write."""
    if write.distrusted:
        yield "it was made after an answer about someone else"
    if run.options.dry_run:
        yield "it was made in a dry run"
    if not write.begun:
        yield "the history did not say before that a change begins"
    for had, has in write.step.customers:
        if had is None and has is not None:
            yield from _created(has, run, write)
        elif had is not None and has is None:
            yield from _deleted(had, run, write)
        elif had is not None and has is not None:
            yield from _changed(had, has, run, write)
    for before, after in write.step.entities:
        yield from _entity(before, after, run)


def _is_begun(write: Write, *kinds: ChangeKind, customer: Customer) -> bool:
    return any(
        document["kind"] in kinds
        and customer.id == (document["customer_id"] or customer.id)
        and (document["customer_id"] is not None or document["customer_key"] == customer.key)
        for document in write.begun
    )


def _created(has: Customer, run: Circumstances, write: Write) -> Iterator[str]:
    if not _is_begun(write, ChangeKind.CREATE_CUSTOMER, customer=has):
        yield "the history did not say that this creation begins"
    if not has.managed:
        yield "created without our marks"
    wanted = run.wanted()
    if has.key not in wanted.values():
        yield f"created {has.key}, which no consumer needs"
    for subject in has.subjects:
        if wanted.get(subject) != has.key:
            yield f"created {has.key} with {subject} of {wanted.get(subject)}"
        if not run.announced(ChangeKind.CREATE_CUSTOMER, has, subject):
            yield f"created {has.key} with {subject}, which the plan did not say"


_SETS_MARKS = (ChangeKind.MARK_ORPHANED, ChangeKind.UNMARK_ORPHANED, ChangeKind.DETACH_SUBJECTS)
_EDITS = (
    ChangeKind.ADOPT_CUSTOMER,
    ChangeKind.ATTACH_SUBJECTS,
    ChangeKind.CREATE_CUSTOMER,
    ChangeKind.RENAME_CUSTOMER,
    ChangeKind.MOVE_SUBJECTS,
    *_SETS_MARKS,
)


def _changed(had: Customer, has: Customer, run: Circumstances, write: Write) -> Iterator[str]:
    if not any(
        document["kind"] in _EDITS and had.id in (document["customer_id"], *_origins_of(document, run))
        for document in write.begun
    ):
        yield f"the history did not say that a change of {had.key} begins"
    if not had.managed:
        yield from _adopted(had, has, run)
    if dict(had.rest) != dict(has.rest) or had.key != has.key:
        yield f"changed fields of people on {had.key}: {dict(had.rest)} -> {dict(has.rest)}"
    yield from _metadata(had, has, run)
    if had.name != has.name:
        yield from _renamed(had, has, run)
    for subject in sorted(has.subjects - had.subjects):
        yield from _attached(had, subject, run)
    for subject in sorted(had.subjects - has.subjects):
        yield from _detached(had, subject, run)
        if (
            run.announced(ChangeKind.MOVE_SUBJECTS, had, subject)
            and run.wanted().get(subject) in write.foreign
        ):
            yield f"moved {subject} away from {had.key}, though its new customer is not ours"


def _metadata(had: Customer, has: Customer, run: Circumstances) -> Iterator[str]:
    theirs = [
        {name: value for name, value in one.metadata.items() if name not in RESERVED_KEYS}
        for one in (had, has)
    ]
    if theirs[0] != theirs[1]:
        yield f"changed metadata of people on {had.key}: {theirs[0]} -> {theirs[1]}"
    ours = {name for name in RESERVED_KEYS if had.metadata.get(name) != has.metadata.get(name)}
    marks = ours - OWNERSHIP
    if had.managed and ours & OWNERSHIP:
        yield f"changed its ownership metadata on {had.key}: {sorted(ours)}"
    if marks and not any(run.announced(kind, had) for kind in _SETS_MARKS):
        yield f"changed marks of {had.key}, which the plan did not say: {sorted(marks)}"
    if any(_MARK.match(has.metadata.get(name, "")) for name in marks):
        if run.policy != "sync":
            yield f"marked {had.key} under policy {run.policy}"
        if not run.consumers and not run.options.allow_empty:
            yield f"marked {had.key} while the source was empty"


def _origins_of(document: Mapping[str, object], run: Circumstances) -> list[str | None]:
    """Return the customers that the subjects of a change come from: they may be put back there."""
    keys = document["subject_keys"]
    assert isinstance(keys, list)
    moves = run.changes(ChangeKind.MOVE_SUBJECTS)
    return [move.customer_id for move in moves if set(keys) & set(move.subject_keys)]


def _adopted(had: Customer, has: Customer, run: Circumstances) -> Iterator[str]:
    if not run.options.adopt:
        yield f"changed {had.key}, which is a person's"
    elif MANAGED_BY in had.metadata or SYNC_OWNER in had.metadata:
        yield f"adopted {had.key}, which has an owner"
    elif not run.announced(ChangeKind.ADOPT_CUSTOMER, had) or ADOPTED not in has.metadata:
        yield f"changed {had.key}, which is a person's, without adopting it"
    elif (had.name, had.subjects) != (has.name, has.subjects):
        yield f"changed more than marks of {had.key} when it was adopted"


def _renamed(had: Customer, has: Customer, run: Circumstances) -> Iterator[str]:
    alone = {run.customer_of(one): one.username for one in run.consumers.values() if not one.group}
    if ADOPTED in had.metadata:
        yield f"renamed {had.key}, which a person named"
    if alone.get(had.key or "") != has.name:
        yield f"renamed {had.key} to {has.name}"
    if not run.announced(ChangeKind.RENAME_CUSTOMER, had):
        yield f"renamed {had.key}, which the plan did not say"


def _attached(had: Customer, subject: str, run: Circumstances) -> Iterator[str]:
    came_from = any(
        move.customer_id == had.id and subject in move.subject_keys
        for move in run.changes(ChangeKind.MOVE_SUBJECTS)
    )
    if came_from:
        return  # put back, since its new customer could not get it
    if run.wanted().get(subject) != had.key:
        yield f"attached {subject} of {run.wanted().get(subject)} to {had.key}"
    if not run.announced(ChangeKind.ATTACH_SUBJECTS, had, subject):
        yield f"attached {subject} to {had.key}, which the plan did not say"


def _detached(had: Customer, subject: str, run: Circumstances) -> Iterator[str]:
    wanted = run.wanted().get(subject)
    if ADOPTED in had.metadata:
        yield f"detached {subject} from {had.key}, which was adopted"
    if run.announced(ChangeKind.MOVE_SUBJECTS, had, subject):
        if not run.options.allow_move or run.policy == "create-only":
            yield f"moved {subject} from {had.key} without permission"
        if wanted in (None, had.key):
            yield f"moved {subject} from {had.key} although it belongs to {wanted}"
    elif run.announced(ChangeKind.DETACH_SUBJECTS, had, subject):
        if wanted is not None:
            yield f"detached {subject} from {had.key}, which a consumer needs for {wanted}"
        if run.policy != "sync" or not _is_due(had, run, DETACH_AFTER):
            yield f"detached {subject} from {had.key} too early"
    else:
        yield f"detached {subject} from {had.key}, which the plan did not say"


def _is_due(customer: Customer, run: Circumstances, after: timedelta) -> bool:
    """Return whether some mark of a customer is old enough."""
    texts = [value for name, value in customer.metadata.items() if name.startswith("orphaned-at")]
    marks = [match[0] for text in texts if (match := _MARK.match(text))]
    found = [datetime.strptime(mark, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) for mark in marks]
    return any(run.now - mark >= after for mark in found)


def _deleted(had: Customer, run: Circumstances, write: Write) -> Iterator[str]:
    if not _is_begun(write, ChangeKind.DELETE_CUSTOMER, customer=had):
        yield "the history did not say that this deletion begins"
    wanted = run.wanted()
    if not had.managed or ADOPTED in had.metadata:
        yield f"deleted {had.key}, which is a person's"
    if had.subscribed or had.entitled:
        yield f"deleted {had.key}, which has a subscription or an entitlement"
    if run.policy != "sync" or not run.announced(ChangeKind.DELETE_CUSTOMER, had):
        yield f"deleted {had.key}, which the plan did not say"
    if not _is_due(had, run, DELETE_AFTER):
        yield f"deleted {had.key} too early"
    if had.key in wanted.values() or any(subject in wanted for subject in had.names):
        yield f"deleted {had.key}, which a consumer needs"
    if any(not subject.startswith("consumer:") for subject in had.subjects):
        yield f"deleted {had.key}, to which a person attached {sorted(had.subjects)}"
    if not run.consumers and not run.options.allow_empty:
        yield f"deleted {had.key} while the source was empty"


def _entity(before: Entity | None, after: Entity | None, run: Circumstances) -> Iterator[str]:
    if before is None:
        return
    if after is None:
        if not before.managed:
            yield f"deleted the entity {before.key}, which is a person's"
        if before.key in run.wanted():
            yield f"deleted the entity {before.key}, which a consumer needs"
        return
    by_server = {"createdBy", "customerId"}
    theirs = {name: value for name, value in before.metadata.items() if name not in RESERVED_KEYS | by_server}
    kept = {name: after.metadata.get(name) for name in theirs}
    named = before.name not in (None, "", before.key)
    if not before.managed and (theirs or named or MANAGED_BY in before.metadata):
        yield f"changed the entity {before.key}, which is a person's"
    if theirs != kept:
        yield f"changed metadata of people on the entity {before.key}"


def faults_of_outcome(outcome: Outcome, truth: Truth) -> Iterator[str]:
    """Yield what an outcome says and what is not so, by the truth at that moment."""
    change, there = outcome.change, truth.by_key(outcome.change.customer_key)
    if change.kind is not ChangeKind.CREATE_CUSTOMER:
        return
    is_there = bool(there and there.managed and set(change.subject_keys) <= there.names)
    if outcome.status in _MADE and not is_there:
        yield f"creation of {change.customer_key} is {outcome.status}, and it is not there"


def lost_subjects(outcomes: Sequence[Outcome], truth: Truth) -> Iterator[str]:
    """Yield subjects that a run to its end moved away and nowhere else, if no person acted meanwhile."""
    if any("could not be put back" in outcome.detail for outcome in outcomes):
        return
    for outcome in outcomes:
        if outcome.change.kind is ChangeKind.MOVE_SUBJECTS and outcome.status in _MADE:
            for subject in outcome.change.subject_keys:
                if not truth.payers(subject):
                    yield f"moved {subject} away from {outcome.change.customer_key}, and nowhere else"


_MADE = (Status.DONE, Status.UNCHANGED)


# Once nothing fails any more


def unexplained(plan: Plan, truth: Truth, run: Circumstances) -> Iterator[str]:
    """Yield what a plan leaves undone or reports without a reason that holds."""
    for change in plan.changes:
        if change.actionable:
            yield f"still to do: {change.kind} {change.customer_key} {change.subject_keys}: {change.reason}"
        elif change.kind is ChangeKind.BLOCKED and not _is_truly_blocked(change, truth, run):
            yield f"wrongly blocked: {change.customer_key} {change.subject_keys}: {change.reason}"
    reported: set[str] = set()
    for change in plan.changes:
        reported.update(change.subject_keys)
    for subject, key in run.wanted().items():
        payers = truth.payers(subject)
        right = [one for one in payers if one.key == key and one.managed]
        if not (len(payers) == len(right) == 1) and subject not in reported:
            yield f"{subject} should be paid by {key}, is by {[one.key for one in payers]}, and no word of it"


def _is_truly_blocked(change: Change, truth: Truth, run: Circumstances) -> bool:
    there = truth.by_key(change.customer_key)
    named = truth.customers.get(change.customer_id or "")
    if not change.subject_keys and change.customer_id is None:
        return not run.consumers  # an empty source
    if run.policy == "create-only":
        return True
    if any(one is not None and (one.subscribed or not one.managed) for one in (there, named)):
        return True
    if named is not None and named.entitled:
        return True
    if change.customer_key and any(change.customer_key in one.subjects for one in truth.customers.values()):
        return True  # a key that is a subject elsewhere
    wanted = run.wanted()
    return any(
        one.key != wanted.get(subject) and _keeps(one, subject, run)
        for subject in change.subject_keys
        for one in truth.payers(subject)
    )


def _keeps(payer: Customer, subject: str, run: Circumstances) -> bool:
    """Return whether a subject stays with the customer that pays for it, though it belongs to another."""
    movable = payer.managed and ADOPTED not in payer.metadata and not payer.subscribed
    return not (movable and run.options.allow_move and payer.key != subject)


def summary(faults: Sequence[str]) -> str:
    return "\n  ".join(["the model found:", *dict.fromkeys(faults)])
