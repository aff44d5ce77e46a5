"""Subject entities: which of them a plan writes, and writing them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from syncd.changes import Change, ChangeKind, State
from syncd.errors import RefusedError
from syncd.model import DesiredCustomer, DesiredSubject, ObservedCustomer, ObservedSubject
from syncd.outcome import Outcome, Status
from syncd.ownership import may_write_subject
from syncd.targets import MeteringTarget, SubjectWrite

_SUBJECTS_AT_ONCE = 100


def entity_changes(
    want: DesiredCustomer,
    subjects: Iterable[DesiredSubject],
    have: ObservedCustomer | None,
    entities: Mapping[str, ObservedSubject],
    owner_id: str,
) -> Iterator[Change]:
    """Yield what has to be written so that these subjects have entities that carry our fields."""
    for subject in subjects:
        entity = entities.get(subject.key)
        if entity is None:
            reason, before = f"no subject entity yet: {subject.principal}", None
        elif _differs(subject, entity) and may_write_subject(entity, owner_id):
            reason = f"the subject entity differs: {subject.principal}"
            before = State(entity.display_name, None, dict(entity.metadata))
        else:
            continue
        after = State(subject.display_name, None, dict(subject.metadata))
        identity = have.id if have else None
        yield Change(ChangeKind.UPSERT_SUBJECT, want.key, (subject.key,), reason, identity, before, after)


def _differs(subject: DesiredSubject, entity: ObservedSubject) -> bool:
    if subject.display_name is not None and subject.display_name != entity.display_name:
        return True
    return any(entity.metadata.get(name) != value for name, value in subject.metadata.items())


class EntityWriter:
    """Writes subject entities; none for `unplaced` subjects: a server may make a customer for such a one."""

    def __init__(self, owner_id: str, target: MeteringTarget, unplaced: set[str]) -> None:
        self._owner_id = owner_id
        self._target = target
        self._unplaced = unplaced

    def outcomes(self, changes: Sequence[Change]) -> Iterator[Outcome]:
        """Write these entities, a hundred at once."""
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
                yield Outcome(batch[0][0], Status.BLOCKED, refusal(error))
                return
            # One of them is refused; one by one tells which.
            for single in batch:
                yield from self._write_batch([single])
            return
        for change, _ in batch:
            yield Outcome(change, Status.DONE)


def refusal(error: RefusedError) -> str:
    """Say what a refused change means."""
    said = error.detail or f"HTTP {error.status}"
    if error.status == 409:
        return f"in conflict with what was created meanwhile: {said}. Plan again"
    return f"the metering API refuses it: {said}"
