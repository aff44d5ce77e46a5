"""Health of the metering API while a plan is applied: whether it fails on one entity or on all."""

from __future__ import annotations

import threading

from syncd.core.errors import ApiError, MalformedError, UnreachableError, UnreliableApiError
from syncd.core.ownership import MANAGER
from syncd.metering.base import MeteringTarget

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
