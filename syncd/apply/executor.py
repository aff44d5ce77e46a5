"""Carry out a plan; each change looks again at what it is about to write.

The kinds of changes follow one another. Within a kind several changes are under way at once, but for
those that share a customer or a subject: they keep the order of the plan.

A change that the API refuses, or that the world has overtaken, is recorded as blocked and the rest
goes on. What concerns the whole run (network, token) ends it with `ApplyStoppedError`, which carries
what was done until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from syncd.apply import edits
from syncd.apply.pool import Job, Pool
from syncd.apply.subject_entities import EntityWriter, Placed, Results, names_of, refusal
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import ApiError, ApplyStoppedError, BlockedError, RefusedError
from syncd.core.ownership import is_managed, owner_of
from syncd.metering.base import Decide, MeteringTarget, Remover
from syncd.metering.deletion import NoRemover

# MERGED: Making a retired customer again, where the one that was to take its subject refuses it.


def restore(target: MeteringTarget, retired: Change) -> None:
    """Create the customer anew as it was before; it gets another id. Raises RefusedError."""
    before = retired.before
    assert before is not None  # noqa: S101 - the planner gives every retirement what there was
    key = retired.customer_key or ""
    metadata = {name: str(value) for name, value in (before.metadata or {}).items()}
    target.create_customer(key, before.name or key, before.subject_keys or (), metadata, before.details)


_NEEDS_PLACE = (ChangeKind.CREATE_CUSTOMER, ChangeKind.ATTACH_SUBJECTS)

Report = Callable[[Sequence[Outcome]], None]


def apply_plan(
    plan: Plan,
    target: MeteringTarget,
    *,
    remover: Remover | None = None,
    concurrency: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda _outcomes: None,
) -> tuple[Outcome, ...]:
    """Carry out the plan and return what became of each change in its order, blocked ones included.

    At most `concurrency` requests are under way at once. `report` is told the outcomes as they happen,
    a few at a time, never by two threads at once; `should_stop` is asked before the first change, which
    may be long after the run began, and after each.
    """
    done: dict[int, Outcome] = {}

    def note(results: list[Results]) -> None:
        found = [result for several in results for result in several]
        done.update(found)
        report([outcome for _, outcome in found])

    applier = _Applier(plan.owner_id, target, remover or NoRemover())
    pool: Pool[Results] = Pool(concurrency, note, should_stop)
    try:
        for kind, changes in _by_kind(plan):
            stopped = pool.stopped or should_stop()
            if stopped or not all(map(pool.run, applier.jobs(kind, changes, note))):
                when = "between two changes" if done else "before its first change"
                raise ApplyStoppedError(f"stopped by request {when}", _in_order(done))
    except ApiError as error:
        raise ApplyStoppedError(str(error), _in_order(done)) from error
    note([[(i, Outcome(c, Status.BLOCKED, c.reason)) for i, c in enumerate(plan.changes) if _is_blocked(c)]])
    return _in_order(done)


def _by_kind(plan: Plan) -> list[tuple[ChangeKind, list[Placed]]]:
    """Return the changes to carry out with their places in the plan, kind after kind."""
    kinds: dict[ChangeKind, list[Placed]] = {kind: [] for kind in ChangeKind}
    for place, change in enumerate(plan.changes):
        if change.actionable:
            kinds[change.kind].append((place, change))
    return [(kind, changes) for kind, changes in kinds.items() if changes]


def _is_blocked(change: Change) -> bool:
    return change.kind is ChangeKind.BLOCKED


def _in_order(done: dict[int, Outcome]) -> tuple[Outcome, ...]:
    return tuple(done[place] for place in sorted(done))


class _Applier:
    """Knows how each kind of change is made; called by several threads, each with a change of its own."""

    def __init__(self, owner_id: str, target: MeteringTarget, remover: Remover) -> None:
        self._owner_id = owner_id
        self._target = target
        self._remover = remover
        # Where a subject that is being moved came from: it goes back when its new place refuses it.
        self._origin: dict[str, str] = {}
        # The same for a subject whose customer had to go: that one is made again.
        self._retired: dict[str, Change] = {}
        # Subjects that found no place on their customer: their entities would make a server with
        # the subject hook create a customer for them.
        self._unplaced: set[str] = set()

    def jobs(
        self, kind: ChangeKind, changes: list[Placed], note: Callable[[list[Results]], None]
    ) -> Iterator[list[Job[Results]]]:
        """Yield the jobs of one kind, one list after the other; `note` is told at once what needs none."""
        if kind is ChangeKind.UPSERT_SUBJECT:
            yield from EntityWriter(self._owner_id, self._target, self._unplaced).jobs(changes, note)
        else:
            yield [self._job(place, change) for place, change in changes]

    def _job(self, place: int, change: Change) -> Job[Results]:
        return Job(lambda: [(place, self._single(change))], self._names(change))

    def _names(self, change: Change) -> frozenset[str]:
        """Return the customers and subjects that carrying out this change may touch."""
        origins = frozenset(self._origin[key] for key in change.subject_keys if key in self._origin)
        retired = (names_of(self._retired[key]) for key in change.subject_keys if key in self._retired)
        return names_of(change).union(origins, *retired)

    def _single(self, change: Change) -> Outcome:
        if change.kind in _NEEDS_PLACE:
            keys = tuple(key for key in change.subject_keys if key not in self._unplaced)
            if not keys:
                return Outcome(
                    change, Status.SKIPPED, "its subjects could not leave the customer they are on"
                )
            change = replace(change, subject_keys=keys)
        try:
            return Outcome(change, Status.DONE if self._carry_out(change) else Status.UNCHANGED)
        except BlockedError as error:
            reason = str(error)
        except RefusedError as error:
            reason = refusal(error)
        self._unplaced.update(change.subject_keys)
        return Outcome(change, Status.BLOCKED, reason + self._put_back(change))

    def _carry_out(self, change: Change) -> bool:
        """Make one change and tell whether it had to be; raises BlockedError, or the ApiError that fits."""
        ours = self._owner_id
        match change.kind:
            case ChangeKind.ADOPT_CUSTOMER:
                return self._edit(change, edits.adopting(change))
            case ChangeKind.MARK_ORPHANED | ChangeKind.UNMARK_ORPHANED:
                return self._edit(change, edits.marking(change, ours))
            case ChangeKind.MOVE_SUBJECTS:
                return self._move_off(change)
            case ChangeKind.RETIRE_CUSTOMER:
                return self._retire(change)
            case ChangeKind.DETACH_SUBJECTS:
                return self._edit(change, edits.detaching(change, ours))
            case ChangeKind.CREATE_CUSTOMER:
                return self._create(change)
            case ChangeKind.ATTACH_SUBJECTS:
                return self._edit(change, edits.adding(change.subject_keys, ours))
            case ChangeKind.RENAME_CUSTOMER:
                return self._edit(change, edits.renaming(change, ours))
            case ChangeKind.DELETE_CUSTOMER:
                return self._delete_customer(change)
            case ChangeKind.DELETE_SUBJECT:
                return self._delete_subject(change)
            case _:
                raise ValueError(f"{change.kind} is not carried out here")

    def _put_back(self, change: Change) -> str:
        """Return moved subjects to where they were, so that a refusal leaves no usage without a customer."""
        if change.kind not in _NEEDS_PLACE:
            return ""
        origins: dict[str, list[str]] = {}
        for key in change.subject_keys:
            if key in self._origin:
                origins.setdefault(self._origin[key], []).append(key)
        retired = [self._retired[key] for key in change.subject_keys if key in self._retired]
        try:
            for origin, keys in origins.items():
                self._target.edit_customer(origin, edits.adding(tuple(keys), self._owner_id))
            for gone in retired:
                restore(self._target, gone)
        except (BlockedError, RefusedError) as error:
            return f". The moved subjects could not be put back either ({error}) and are on no customer now"
        return ". The moved subjects were put back where they were" if origins or retired else ""

    def _edit(self, change: Change, decide: Decide) -> bool:
        return self._target.edit_customer(change.customer_id or "", decide)

    def _require_open(self, customer_key: str) -> None:
        """Raise BlockedError where a subject must not be taken off, since this customer could not take it."""
        place = self._target.customer_by_key(customer_key)
        if place is not None:
            edits.require_open(place, self._owner_id)

    def _retire(self, change: Change) -> bool:
        self._require_open(change.to_customer_key or "")
        deleted = self._delete_customer(change)
        self._retired.update(dict.fromkeys(change.subject_keys, change))
        return deleted

    def _move_off(self, change: Change) -> bool:
        self._require_open(change.to_customer_key or "")
        moved = self._edit(change, edits.detaching(change, self._owner_id))
        self._origin.update(dict.fromkeys(change.subject_keys, change.customer_id or ""))
        return moved

    def _delete_customer(self, change: Change) -> bool:
        self._edit(change, edits.deleting(change, self._owner_id))
        return self._remover.delete_customer(change.customer_id or "")

    def _delete_subject(self, change: Change) -> bool:
        (key,) = change.subject_keys
        if key in self._unplaced:
            raise BlockedError("its customer still carries it")
        return self._remover.delete_subject(key)

    def _create(self, change: Change) -> bool:
        key, after = change.customer_key or "", change.after
        assert after is not None  # noqa: S101 - the planner gives every creation its state
        metadata = {name: str(value) for name, value in (after.metadata or {}).items()}
        try:
            self._target.create_customer(key, after.name or key, change.subject_keys, metadata, after.details)
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
        if not is_managed(there.metadata, self._owner_id):
            raise BlockedError(f"customer {there.key} was created meanwhile by {owner_of(there)}; plan again")
        missing = [key for key in change.subject_keys if not there.carries(key)]
        if missing or any(there.metadata.get(name) != value for name, value in marks.items()):
            raise BlockedError(f"customer {there.key} was created meanwhile and differs; plan again")
        return True
