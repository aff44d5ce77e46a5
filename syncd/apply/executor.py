"""Applies a plan; each change reads the current state again before it writes, and needs it as planned.

Changes run kind by kind. Within a kind several run concurrently, but changes that share a customer or a
subject run one after the other, in the order of the plan.

Each change stands on its own: one that the API refuses or fails on, or whose premises no longer hold, is
recorded as blocked and the run continues. A wrong token, an API that answers no read either, or
several different entities in a row that it fails on (`Health`) end the run with
`ApplyStoppedError`, which carries the outcomes so far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from syncd.apply import edits
from syncd.apply.pool import Job, Pool
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import (
    ApiError,
    ApplyStoppedError,
    BlockedError,
    LockedError,
    MalformedError,
    RefusedError,
    StoppedError,
    UnreachableError,
    UnreliableApiError,
)
from syncd.core.model import ObservedCustomer, ObservedSubject
from syncd.core.ownership import MANAGER, is_managed, may_write_subject, owner_of
from syncd.metering.base import CustomerEdit, Decide, MeteringTarget, NoRemover, Remover, SubjectWrite

FAILURES = (UnreachableError, MalformedError)
"""No usable answer to a write: perhaps only about this entity (OpenMeter answers 500 to a NUL in a key)."""
MAX_FAILED_IN_A_ROW = 5


class Health:
    """Distinguishes a metering API that fails on one entity from one that fails on all. Thread-safe."""

    def __init__(self, target: MeteringTarget) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._failed: set[str] = set()
        self.given_up: ApiError | None = None
        """Why no further change is tried, if so."""

    def answered(self) -> None:
        """Record that the API answered a change as its specification says."""
        if self._failed:
            with self._lock:
                self._failed.clear()

    def failed(self, entity: str, error: ApiError) -> None:
        """Record that the API failed on a change of this entity; raises ApiError if that ends the run."""
        if isinstance(error, UnreliableApiError):
            raise error  # it mixes up its answers: the next one may be wrong too
        # Any key will do, and this one is harmless: reading the entity itself may fail as its change did.
        self._target.customer_by_key(MANAGER)
        with self._lock:
            self._failed.add(entity)
            if len(self._failed) >= MAX_FAILED_IN_A_ROW:
                self.given_up = type(error)(
                    f"the metering API failed on {len(self._failed)} different customers in a row, so the run"
                    f" stopped; the last: {error}"
                )


REFUSED = "the metering API refused it"
"""How the reason of a change starts that the server refused."""
_SUBJECTS_AT_ONCE = 100

Indexed = tuple[int, Change]
"""A change and its index in the plan."""
Results = list[tuple[int, Outcome]]
"""Outcomes, each with the index of its change in the plan."""
_Ready = tuple[Indexed, SubjectWrite]


class EntityWriter:
    """Writes subject entities, but not of `unattached` subjects: a server may create customers for those.

    `health` learns of each answer of the API; it raises ApiError if the run has to end.
    """

    def __init__(
        self,
        owner_id: str,
        target: MeteringTarget,
        unattached: set[str],
        health: Health,
    ) -> None:
        self._health = health
        self._owner_id = owner_id
        self._target = target
        self._unattached = unattached
        self._refused: list[_Ready] = []

    def jobs(
        self, changes: Sequence[Indexed], record: Callable[[list[Results]], None]
    ) -> Iterator[list[Job[Results]]]:
        """Read the existing entities, and yield jobs that write a hundred at once.

        `record` receives at once the outcomes that need no write. If a batch is refused, its entities follow
        one by one after all batches, which shows which of them the server refuses.
        """
        ready, rest = self._split(changes)
        record([rest])
        batches = iter(ready)
        yield [self._job(batch) for batch in iter(lambda: list(islice(batches, _SUBJECTS_AT_ONCE)), [])]
        yield [self._job([single]) for single in sorted(self._refused, key=lambda entry: entry[0][0])]

    def _split(self, changes: Sequence[Indexed]) -> tuple[list[_Ready], Results]:
        """Return the entities to write, and the outcomes of the rest."""
        entities = self._target.subjects()
        existing = {entity.key: entity for entity in entities or ()}
        ready: list[_Ready] = []
        rest: Results = []
        for index, change in changes:
            key = change.subject_keys[0]
            if key in self._unattached:
                rest.append((index, _skipped(change, "its subject could not be attached")))
            elif entities is None:
                rest.append((index, _skipped(change, "the metering API no longer has subject entities")))
            elif (write := self._write(change, existing.get(key))) is None:
                rest.append((index, Outcome(change, Status.UNCHANGED)))
            else:
                ready.append(((index, change), write))
        return ready, rest

    def _job(self, batch: list[_Ready]) -> Job[Results]:
        # Customers are resources too: a server with the subject hook copies an entity to its customer.
        names = [resources_of(change) for (_, change), _ in batch]
        return Job(
            lambda: self._write_batch(batch), frozenset[str]().union(*names), tuple(c for (_, c), _ in batch)
        )

    def _write(self, change: Change, existing: ObservedSubject | None) -> SubjectWrite | None:
        """Return the entity as it is now with syncd's fields; None if it is equal or not writable."""
        after = change.after
        assert after is not None  # noqa: S101 - the planner gives every upsert its state
        fields = dict(after.metadata or {})
        if existing is None:
            return SubjectWrite(change.subject_keys[0], after.name, fields)
        metadata = {**existing.metadata, **fields}
        renamed = after.name is not None and after.name != existing.display_name
        if not may_write_subject(existing, self._owner_id):
            return None
        if metadata == existing.metadata and not renamed:
            return None
        return SubjectWrite(existing.key, after.name, metadata)

    def _write_batch(self, batch: list[_Ready]) -> Results:
        try:
            self._target.write_subjects([write for _, write in batch])
        except (RefusedError, *FAILURES) as error:
            if isinstance(error, RefusedError):
                self._health.answered()
            else:
                self._health.failed(batch[0][1].key, error)
            if len(batch) > 1:
                self._refused += batch
                return []
            ((index, change), _) = batch[0]
            reason = refusal_reason(error) if isinstance(error, RefusedError) else failure_reason(error)
            return [(index, Outcome(change, Status.BLOCKED, reason))]
        self._health.answered()
        return [(index, Outcome(change, Status.DONE)) for (index, change), _ in batch]


def _skipped(change: Change, why: str) -> Outcome:
    return Outcome(change, Status.SKIPPED, why)


def resources_of(change: Change) -> frozenset[str]:
    """Return the customers and subjects of a change: ids, keys, subject keys."""
    customers = (change.customer_id, change.customer_key, change.to_customer_key)
    return frozenset(name for name in (*customers, *change.subject_keys) if name)


def failure_reason(error: ApiError) -> str:
    """Return the reason of a change that the API failed on, for its outcome."""
    return f"the metering API failed on it, and whether it was made shows in the next plan: {error}"


def refusal_reason(error: RefusedError) -> str:
    """Return the reason of a refused change, for its outcome."""
    said = error.detail or f"HTTP {error.status}"
    if error.status == 409:
        return f"conflicts with something created since the plan was made: {said}. Plan again"
    return f"{REFUSED}: {said}"


_ATTACHING = (ChangeKind.CREATE_CUSTOMER, ChangeKind.ATTACH_SUBJECTS)

Begin = Callable[[Sequence[Change]], None]
Report = Callable[[Sequence[Outcome]], None]


def apply_plan(
    plan: Plan,
    target: MeteringTarget,
    *,
    seen: Iterable[ObservedCustomer] = (),
    remover: Remover | None = None,
    concurrency: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    begin: Begin = lambda _changes: None,
    report: Report = lambda _outcomes: None,
) -> tuple[Outcome, ...]:
    """Apply the plan and return the outcome of each change in plan order, blocked ones included.

    `seen` are the customers that the plan was made on: none of them is changed if it now reads otherwise.
    At most `concurrency` requests run at once. `begin` receives changes before they are made. `report`
    receives outcomes as they happen, a few at a time and never from two threads at once. `should_stop` is
    called before the first change, which may be long after the run began, and after each change.
    """
    done: dict[int, Outcome] = {}

    def record(results: list[Results]) -> None:
        found = [result for several in results for result in several]
        done.update(found)
        report([outcome for _, outcome in found])

    applier = _Applier(plan, target, remover or NoRemover(), seen)
    health = applier.health

    def announce(jobs: Sequence[Job[Results]]) -> None:
        begin([change for job in jobs for change in job.about])

    def is_over() -> bool:
        return health.given_up is not None or should_stop()

    pool: Pool[Results] = Pool(concurrency, record, is_over, announce)
    try:
        for kind, changes in _by_kind(plan):
            stopped = pool.stopped or should_stop()
            if stopped or not all(map(pool.run, applier.jobs(kind, changes, record))):
                if health.given_up is not None:
                    break
                when = "between two changes" if done else "before its first change"
                raise ApplyStoppedError(f"stopped by request {when}", _in_order(done))
        if health.given_up is not None:
            raise health.given_up
    except (ApiError, LockedError, StoppedError) as error:
        raise ApplyStoppedError(str(error), _in_order(done)) from error
    record(
        [[(i, Outcome(c, Status.BLOCKED, c.reason)) for i, c in enumerate(plan.changes) if _is_blocked(c)]]
    )
    return _in_order(done)


def _by_kind(plan: Plan) -> list[tuple[ChangeKind, list[Indexed]]]:
    """Return the changes to make by kind, each with its index in the plan."""
    kinds: dict[ChangeKind, list[Indexed]] = {kind: [] for kind in ChangeKind}
    for index, change in enumerate(plan.changes):
        if change.actionable:
            kinds[change.kind].append((index, change))
    return [(kind, changes) for kind, changes in kinds.items() if changes]


def _is_blocked(change: Change) -> bool:
    return change.kind is ChangeKind.BLOCKED


def _in_order(done: dict[int, Outcome]) -> tuple[Outcome, ...]:
    return tuple(done[index] for index in sorted(done))


class _Applier:
    """Makes changes of every kind; called from several threads, each with its own change."""

    def __init__(
        self, plan: Plan, target: MeteringTarget, remover: Remover, seen: Iterable[ObservedCustomer]
    ) -> None:
        self._owner_id = plan.owner_id
        self._target = target
        self._remover = remover
        self.health = Health(target)
        # The customers that this plan changes, as they have to be read: as planned, with the edits so far.
        changed = {change.customer_id for change in plan.actionable}
        self._expected = {customer.id: customer for customer in seen if customer.id in changed}
        # The customer that a moving subject came from: it goes back if the new customer refuses it.
        self._moved_from: dict[str, str] = {}
        # Subjects that could not be attached: writing their entities would make a server with the
        # subject hook create a customer for them.
        self._unattached: set[str] = set()

    def jobs(
        self, kind: ChangeKind, changes: list[Indexed], record: Callable[[list[Results]], None]
    ) -> Iterator[list[Job[Results]]]:
        """Yield lists of jobs of one kind, to run in order; `record` gets outcomes that need no job."""
        if kind is ChangeKind.UPSERT_SUBJECT:
            yield from EntityWriter(self._owner_id, self._target, self._unattached, self.health).jobs(
                changes, record
            )
        else:
            yield [self._job(index, change) for index, change in changes]

    def _job(self, index: int, change: Change) -> Job[Results]:
        return Job(lambda: [(index, self._single(change))], self._resources(change), (change,))

    def _resources(self, change: Change) -> frozenset[str]:
        """Return the customers and subjects that this change may touch."""
        origins = frozenset(self._moved_from[key] for key in change.subject_keys if key in self._moved_from)
        return resources_of(change) | origins

    def _single(self, change: Change) -> Outcome:
        if change.kind in _ATTACHING:
            keys = tuple(key for key in change.subject_keys if key not in self._unattached)
            if not keys:
                return Outcome(
                    change, Status.SKIPPED, "its subjects could not be detached from their present customer"
                )
            change = replace(change, subject_keys=keys)
        if change.kind is ChangeKind.DELETE_SUBJECT and not self._unattached.isdisjoint(change.subject_keys):
            return Outcome(change, Status.SKIPPED, "its customer still carries it")
        try:
            outcome = Outcome(change, Status.DONE if self._carry_out(change) else Status.UNCHANGED)
        except BlockedError as error:
            reason = str(error)
        except RefusedError as error:
            self.health.answered()
            reason = refusal_reason(error)
            if change.kind is ChangeKind.DELETE_CUSTOMER:  # an entitlement or invoice: it waits, by design
                change = replace(change, settled=True)
        except FAILURES as error:
            self.health.failed(change.customer_key or change.customer_id or change.subject_keys[0], error)
            reason = failure_reason(error)
        else:
            self.health.answered()
            return outcome
        self._unattached.update(change.subject_keys)
        return Outcome(change, Status.BLOCKED, reason + self._put_back(change))

    def _carry_out(self, change: Change) -> bool:
        """Make one change and return whether anything was written. Raises BlockedError or ApiError."""
        owner_id, customer_id = self._owner_id, change.customer_id or ""
        match change.kind:
            case ChangeKind.ADOPT_CUSTOMER:
                return self._edit(customer_id, edits.adopting(change))
            case ChangeKind.MARK_ORPHANED | ChangeKind.UNMARK_ORPHANED:
                return self._edit(customer_id, edits.marking(change, owner_id))
            case ChangeKind.MOVE_SUBJECTS:
                return self._detach_for_move(change)
            case ChangeKind.DETACH_SUBJECTS:
                return self._edit(customer_id, edits.detaching(change, owner_id))
            case ChangeKind.CREATE_CUSTOMER:
                return self._create(change)
            case ChangeKind.ATTACH_SUBJECTS:
                return self._edit(customer_id, edits.adding(change.subject_keys, owner_id))
            case ChangeKind.RENAME_CUSTOMER:
                return self._edit(customer_id, edits.renaming(change, owner_id))
            case ChangeKind.DELETE_CUSTOMER:
                return self._delete_customer(change)
            case ChangeKind.DELETE_SUBJECT:
                return self._delete_subject(change)
            case _:
                raise ValueError(f"{change.kind} is not a change that can be made")

    def _put_back(self, change: Change) -> str:
        """Put moved subjects back on their old customer, so that a refusal leaves no usage unbilled."""
        if change.kind not in _ATTACHING:
            return ""
        origins: dict[str, list[str]] = {}
        for key in change.subject_keys:
            if key in self._moved_from:
                origins.setdefault(self._moved_from[key], []).append(key)
        try:
            for origin, keys in origins.items():
                self._edit(origin, edits.adding(tuple(keys), self._owner_id))
        except UnreliableApiError:
            raise
        except (BlockedError, RefusedError, *FAILURES) as error:
            return (
                f". The moved subjects could not be put back ({error}): the next plan shows on which customer"
                " they are now, if on any"
            )
        return ". The moved subjects were put back" if origins else ""

    def _edit(self, customer_id: str, decide: Decide) -> bool:
        """Edit a customer if it is as expected, or as an earlier try of this edit has left it."""
        expected = self._expected.get(customer_id)
        if expected is None:
            return self._target.edit_customer(customer_id, decide)
        edited = expected

        def decide_as_planned(current: ObservedCustomer) -> CustomerEdit | None:
            nonlocal edited
            edit = decide(current)
            edits.require_as_planned(current, expected, edited)
            if edit is not None:
                edited = edits.applied(edit, expected)
            return edit

        written = self._target.edit_customer(customer_id, decide_as_planned)
        self._expected[customer_id] = edited
        return written

    def _require_accepts_subjects(self, customer_key: str) -> None:
        """Raise BlockedError if the customer that a moving subject is for could not get it."""
        customer = self._target.customer_by_key(customer_key)
        if customer is not None:
            edits.require_accepts_subjects(customer, self._owner_id)

    def _detach_for_move(self, change: Change) -> bool:
        self._require_accepts_subjects(change.to_customer_key or "")
        moved = self._edit(change.customer_id or "", edits.detaching(change, self._owner_id))
        self._moved_from.update(dict.fromkeys(change.subject_keys, change.customer_id or ""))
        return moved

    def _delete_customer(self, change: Change) -> bool:
        customer_id = change.customer_id or ""
        expected = self._expected.get(customer_id)

        is_deletable = edits.deleting(change, self._owner_id)

        def check(current: ObservedCustomer) -> None:
            is_deletable(current)
            if expected is not None:
                edits.require_as_planned(current, expected)

        return self._remover.delete_customer(customer_id, check)

    def _delete_subject(self, change: Change) -> bool:
        (key,) = change.subject_keys

        def check(current: ObservedSubject) -> None:
            if not is_managed(current.metadata, self._owner_id):
                raise BlockedError(f"the subject entity {key} now belongs to someone else; left alone")

        return self._remover.delete_subject(key, check)

    def _create(self, change: Change) -> bool:
        key, after = change.customer_key or "", change.after
        assert after is not None  # noqa: S101 - the planner gives every creation its state
        metadata = {name: str(value) for name, value in (after.metadata or {}).items()}
        try:
            self._target.create_customer(key, after.name or key, change.subject_keys, metadata, after.details)
        except RefusedError as error:
            if error.status != 409 or not self._is_already_created(change, metadata):
                raise
            return False
        return True

    def _is_already_created(self, change: Change, metadata: dict[str, str]) -> bool:
        """Return whether the customer that conflicts with a creation is the one to create.

        It is if the answer to the first attempt was lost, or another syncd with the same owner_id was faster.
        """
        there = self._target.customer_by_key(change.customer_key or "")
        if there is None:
            return False
        if not is_managed(there.metadata, self._owner_id):
            raise BlockedError(
                f"customer {there.key} was created by {owner_of(there)} since the plan was made; plan again"
            )
        missing = [key for key in change.subject_keys if not there.carries(key)]
        if missing or any(there.metadata.get(name) != value for name, value in metadata.items()):
            raise BlockedError(
                f"customer {there.key} was created since the plan was made and differs; plan again"
            )
        return True
