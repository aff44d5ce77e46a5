"""An in-memory metering API that refuses what OpenMeter refuses, fast enough for thousands of states."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from syncd.core.errors import BlockedError, RefusedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject
from syncd.metering.base import Decide, SubjectWrite
from tests.syncd.builders import replace

_NUMBERS = itertools.count()


class MemoryTarget:
    def __init__(self, state: ObservedState) -> None:
        self.customers = {customer.id: customer for customer in state.customers}
        self._subjects = None if state.subjects is None else {s.key: s for s in state.subjects}
        self.details: dict[str, CustomerDetails] = {}
        """The details of created customers, by id."""
        self.writes = 0

    def observe(self) -> ObservedState:
        return ObservedState(tuple(self.customers.values()), self.subjects())

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        new = ObservedCustomer(f"new-{next(_NUMBERS)}", key, name, tuple(subject_keys), dict(metadata))
        self._add(new, details)

    def _add(self, new: ObservedCustomer, details: CustomerDetails) -> None:
        self._require_free(new)
        self.customers[new.id] = new
        self.details[new.id] = details
        self.writes += 1

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        return next((customer for customer in self.customers.values() if customer.key == key), None)

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        there = self.customers.get(customer_id)
        if there is None:
            raise BlockedError("gone")
        edit = decide(there)
        if edit is None:
            return False
        edited = replace(
            there,
            name=there.name if edit.name is None else edit.name,
            subject_keys=there.subject_keys if edit.subject_keys is None else edit.subject_keys,
            metadata={**there.metadata, **(edit.metadata or {})},
        )
        if there.active_subscription and edited.subject_keys != there.subject_keys:
            raise RefusedError("refused", status=400, detail="subject keys of a subscribed customer")
        self._require_free(edited)
        self.customers[customer_id] = edited
        self.writes += 1
        return True

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        return None if self._subjects is None else tuple(self._subjects.values())

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        assert self._subjects is not None
        for write in writes:
            there = self._subjects.get(write.key)
            name = write.display_name
            if name is None and there is not None:
                name = there.display_name
            self._subjects[write.key] = ObservedSubject(write.key, name, dict(write.metadata))
            self.writes += 1

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:
        there = self.customers.get(customer_id)
        if there is None:
            return False
        check(there)
        if there.active_subscription:
            raise RefusedError("refused", status=409, detail="has an active subscription")
        self.writes += 1
        del self.customers[customer_id]
        return True

    def delete_subject(self, key: str, check: Callable[[ObservedSubject], None]) -> bool:
        assert self._subjects is not None
        if key not in self._subjects:
            return False
        check(self._subjects[key])
        self.writes += 1
        del self._subjects[key]
        return True

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def _require_free(self, new: ObservedCustomer) -> None:
        for other in self.customers.values():
            if other.id == new.id:
                continue
            # As in OpenMeter: a subject may be another customer's key, and then counts for both.
            taken = {other.key, *other.subject_keys} & {new.key} - {None}
            if taken or not set(new.subject_keys).isdisjoint(other.subject_keys):
                raise RefusedError("conflict", status=409, detail=f"in conflict with {other.key}")
