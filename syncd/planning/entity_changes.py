"""Which subject entities a plan writes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredCustomer, DesiredSubject, ObservedCustomer, ObservedSubject
from syncd.core.ownership import may_write_subject


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
        elif differs(subject, entity) and may_write_subject(entity, owner_id):
            reason = f"the subject entity differs: {subject.principal}"
            before = EntityState(entity.display_name, None, dict(entity.metadata))
        else:
            continue
        after = EntityState(subject.display_name, None, dict(subject.metadata))
        identity = have.id if have else None
        yield Change(ChangeKind.UPSERT_SUBJECT, want.key, (subject.key,), reason, identity, before, after)


def differs(subject: DesiredSubject, entity: ObservedSubject) -> bool:
    """Tell whether an entity lacks what this subject shall carry."""
    if subject.display_name is not None and subject.display_name != entity.display_name:
        return True
    return any(entity.metadata.get(name) != value for name, value in subject.metadata.items())
