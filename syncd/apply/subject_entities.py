"""Writer of subject entities, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from syncd.apply.health import FAILURES, Health
from syncd.apply.pool import Job
from syncd.core.changes import Change, Outcome, Status
from syncd.core.errors import ApiError, RefusedError
from syncd.core.model import ObservedSubject
from syncd.core.ownership import may_write_subject
from syncd.metering.base import MeteringTarget, SubjectWrite

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
