"""Subject entities: which of them a plan writes, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from syncd.apply.pool import Job
from syncd.core.changes import Change, Outcome, Status
from syncd.core.errors import RefusedError
from syncd.core.model import ObservedSubject
from syncd.core.ownership import may_write_subject
from syncd.metering.base import MeteringTarget, SubjectWrite

_SUBJECTS_AT_ONCE = 100

Placed = tuple[int, Change]
"""A change and its place in the plan."""
Results = list[tuple[int, Outcome]]
"""What became of changes, each with its place in the plan."""
_Ready = tuple[Placed, SubjectWrite]


class EntityWriter:
    """Writes subject entities; none for `unplaced` subjects: a server may make a customer for such a one."""

    def __init__(self, owner_id: str, target: MeteringTarget, unplaced: set[str]) -> None:
        self._owner_id = owner_id
        self._target = target
        self._unplaced = unplaced
        self._refused: list[_Ready] = []

    def jobs(
        self, changes: Sequence[Placed], note: Callable[[list[Results]], None]
    ) -> Iterator[list[Job[Results]]]:
        """Look at the entities that are there, and yield jobs that write a hundred at once.

        What is not to be written is told to `note` at once. Of a hundred that are refused together the
        single ones follow, when those jobs are done: one by one tells which of them it was.
        """
        ready, rest = self._looked_at(changes)
        note([rest])
        batches = iter(ready)
        yield [self._job(batch) for batch in iter(lambda: list(islice(batches, _SUBJECTS_AT_ONCE)), [])]
        yield [self._job([single]) for single in sorted(self._refused, key=lambda entry: entry[0][0])]

    def _looked_at(self, changes: Sequence[Placed]) -> tuple[list[_Ready], Results]:
        """Return what is to be written, and what became of the rest."""
        entities = self._target.subjects()
        there = {entity.key: entity for entity in entities or ()}
        ready: list[_Ready] = []
        rest: Results = []
        for place, change in changes:
            key = change.subject_keys[0]
            if key in self._unplaced:
                rest.append((place, _skipped(change, "its customer could not be given this subject")))
            elif entities is None:
                rest.append((place, _skipped(change, "the metering API has no subject entities any more")))
            elif (write := self._write(change, there.get(key))) is None:
                rest.append((place, Outcome(change, Status.UNCHANGED)))
            else:
                ready.append(((place, change), write))
        return ready, rest

    def _job(self, batch: list[_Ready]) -> Job[Results]:
        # The customers are among the names: a server with the subject hook copies an entity onto its own.
        names = [names_of(change) for (_, change), _ in batch]
        return Job(lambda: self._write_batch(batch), frozenset[str]().union(*names))

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

    def _write_batch(self, batch: list[_Ready]) -> Results:
        try:
            self._target.write_subjects([write for _, write in batch])
        except RefusedError as error:
            if len(batch) > 1:
                self._refused += batch
                return []
            ((place, change), _) = batch[0]
            return [(place, Outcome(change, Status.BLOCKED, refusal(error)))]
        return [(place, Outcome(change, Status.DONE)) for (place, change), _ in batch]


def _skipped(change: Change, why: str) -> Outcome:
    return Outcome(change, Status.SKIPPED, why)


def names_of(change: Change) -> frozenset[str]:
    """Return the customers and subjects that a change is about: ids, keys, subject keys."""
    customers = (change.customer_id, change.customer_key, change.to_customer_key)
    return frozenset(name for name in (*customers, *change.subject_keys) if name)


def refusal(error: RefusedError) -> str:
    """Say what a refused change means."""
    said = error.detail or f"HTTP {error.status}"
    if error.status == 409:
        return f"in conflict with what was created meanwhile: {said}. Plan again"
    return f"the metering API refuses it: {said}"
