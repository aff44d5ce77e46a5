"""Customers with which there is surely nothing to do: nearly all of them in nearly all runs.

The planner looks at the others only. What is not surely at rest may still turn out to be so there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from syncd.entities import differs
from syncd.model import DesiredCustomer, ObservedCustomer, ObservedSubject
from syncd.ownership import is_ours


def at_rest(
    want: DesiredCustomer,
    have: ObservedCustomer | None,
    entities: Mapping[str, ObservedSubject] | None,
    owner_id: str,
) -> bool:
    """Tell whether a customer of ours is as wanted: its name, all subjects on it, their entities."""
    if have is None or want.name != have.name or not is_ours(have.metadata, owner_id):
        return False
    carried: Collection[str] = have.subject_keys
    if len(carried) > 1:
        carried = frozenset(carried)
    for subject in want.subjects:
        if subject.key not in carried:
            return False
        if entities is not None:
            entity = entities.get(subject.key)
            if entity is None or differs(subject, entity):
                return False
    return True
