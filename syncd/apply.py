"""Carry out a plan, one change at a time; each looks again at what it is about to write.

A change that the API refuses, or that the world has overtaken, is recorded as blocked and the rest
goes on. What concerns the whole run (network, token) ends it with `ApplyStoppedError`, which carries
what was done until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from syncd.changes import Change, ChangeKind, Plan
from syncd.errors import ApiError, ApplyStoppedError, BlockedError, RefusedError
from syncd.model import ObservedCustomer, ObservedSubject
from syncd.outcome import Outcome, Status
from syncd.ownership import is_ours, may_write_subject, owner_of
from syncd.plan import subscription_reason
from syncd.targets import CustomerEdit, MeteringTarget, SubjectWrite

_SUBJECTS_AT_ONCE = 100

Report = Callable[[Outcome], None]


def apply_plan(
    plan: Plan,
    target: MeteringTarget,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda _outcome: None,
) -> tuple[Outcome, ...]:
    """Carry out the plan and return what became of each change, blocked ones of the plan included.

    `should_stop` is asked between two changes, `report` is told each outcome as it happens.
    """
    outcomes: list[Outcome] = []
    try:
        for outcome in _Applier(plan.owner_id, target).outcomes(plan):
            outcomes.append(outcome)
            report(outcome)
            if should_stop():
                raise ApplyStoppedError("stopped by request between two changes", tuple(outcomes))
    except ApiError as error:
        raise ApplyStoppedError(str(error), tuple(outcomes)) from error
    return tuple(outcomes)


class _Applier:
    def __init__(self, owner_id: str, target: MeteringTarget) -> None:
        self._owner_id = owner_id
        self._target = target
        # Subjects that found no place on their customer: their entities would make a server with
        # the subject hook create a customer for them.
        self._unplaced: set[str] = set()

    def outcomes(self, plan: Plan) -> Iterator[Outcome]:
        for change in plan.actionable:
            if change.kind is not ChangeKind.UPSERT_SUBJECT:
                yield self._customer_change(change)
        yield from self._subject_changes(plan.of(ChangeKind.UPSERT_SUBJECT))
        for change in plan.of(ChangeKind.BLOCKED):
            yield Outcome(change, Status.BLOCKED, change.reason)

    def _customer_change(self, change: Change) -> Outcome:
        carry_out = {
            ChangeKind.CREATE_CUSTOMER: self._create,
            ChangeKind.ATTACH_SUBJECTS: self._attach,
            ChangeKind.RENAME_CUSTOMER: self._rename,
        }[change.kind]
        try:
            return Outcome(change, Status.DONE if carry_out(change) else Status.UNCHANGED)
        except BlockedError as error:
            reason = str(error)
        except RefusedError as error:
            reason = _refusal(error)
        self._unplaced |= set(change.subject_keys)
        return Outcome(change, Status.BLOCKED, reason)

    def _create(self, change: Change) -> bool:
        key, after = change.customer_key or "", change.after
        assert after is not None  # noqa: S101 - the planner gives every creation its state
        metadata = {name: str(value) for name, value in (after.metadata or {}).items()}
        try:
            self._target.create_customer(key, after.name or key, change.subject_keys, metadata)
        except RefusedError as error:
            if error.status != 409 or not self._is_made(change, metadata):
                raise
            return False
        return True

    def _is_made(self, change: Change, marks: dict[str, str]) -> bool:
        """Tell whether the customer in the way of a creation is the one we wanted to create.

        So it is when the answer to the first attempt was lost, or another syncd of the same owner was faster.
        """
        there = self._target.customer_by_key(change.customer_key or "")
        if there is None:
            return False
        if not is_ours(there.metadata, self._owner_id):
            raise BlockedError(f"customer {there.key} was created meanwhile by {owner_of(there)}; plan again")
        missing = [key for key in change.subject_keys if not there.carries(key)]
        if missing or any(there.metadata.get(name) != value for name, value in marks.items()):
            raise BlockedError(f"customer {there.key} was created meanwhile and differs; plan again")
        return True

    def _attach(self, change: Change) -> bool:
        def decide(there: ObservedCustomer) -> CustomerEdit | None:
            self._require_ours(there)
            missing = tuple(key for key in change.subject_keys if not there.carries(key))
            if not missing:
                return None
            if there.active_subscription:
                raise BlockedError(subscription_reason(there))
            return CustomerEdit(subject_keys=there.subject_keys + missing)

        return self._target.edit_customer(change.customer_id or "", decide)

    def _rename(self, change: Change) -> bool:
        def decide(there: ObservedCustomer) -> CustomerEdit | None:
            self._require_ours(there)
            name = change.after.name if change.after else None
            return None if name == there.name else CustomerEdit(name=name)

        return self._target.edit_customer(change.customer_id or "", decide)

    def _require_ours(self, there: ObservedCustomer) -> None:
        if not is_ours(there.metadata, self._owner_id):
            raise BlockedError(
                f"customer {there.key or there.id} now belongs to {owner_of(there)}; left alone"
            )

    def _subject_changes(self, changes: Sequence[Change]) -> Iterator[Outcome]:
        if not changes:
            return
        entities = self._target.subjects()
        there = {entity.key: entity for entity in entities or ()}
        ready: list[tuple[Change, SubjectWrite]] = []
        for change in changes:
            key = change.subject_keys[0]
            if key in self._unplaced:
                yield Outcome(change, Status.SKIPPED, "its customer could not be given this subject")
            elif entities is None:
                yield Outcome(change, Status.SKIPPED, "the metering API has no subject entities any more")
            else:
                write = self._write(change, there.get(key))
                if write is None:
                    yield Outcome(change, Status.UNCHANGED)
                else:
                    ready.append((change, write))
        remaining = iter(ready)
        while batch := list(islice(remaining, _SUBJECTS_AT_ONCE)):
            yield from self._write_batch(batch)

    def _write(self, change: Change, there: ObservedSubject | None) -> SubjectWrite | None:
        """Merge our fields into the entity as it is now; None where nothing differs or it is not ours."""
        after = change.after
        assert after is not None  # noqa: S101 - the planner gives every upsert its state
        ours = dict(after.metadata or {})
        if there is None:
            return SubjectWrite(change.subject_keys[0], after.name, ours)
        metadata = {**there.metadata, **ours}
        renamed = after.name is not None and after.name != there.display_name
        if not may_write_subject(there, self._owner_id) or (metadata == there.metadata and not renamed):
            return None
        return SubjectWrite(there.key, after.name, metadata)

    def _write_batch(self, batch: list[tuple[Change, SubjectWrite]]) -> Iterator[Outcome]:
        try:
            self._target.write_subjects([write for _, write in batch])
        except RefusedError as error:
            if len(batch) == 1:
                yield Outcome(batch[0][0], Status.BLOCKED, _refusal(error))
                return
            # One of them is refused; one by one tells which.
            for single in batch:
                yield from self._write_batch([single])
            return
        for change, _ in batch:
            yield Outcome(change, Status.DONE)


def _refusal(error: RefusedError) -> str:
    said = error.detail or f"HTTP {error.status}"
    if error.status == 409:
        return f"in conflict with what was created meanwhile: {said}. Plan again"
    return f"the metering API refuses it: {said}"
