"""Fault injection: failures that a test requests, each for a given number of times."""

from enum import StrEnum
from threading import Lock
from typing import Any

from pydantic import Field

from syncd.sandbox.bodies import SandboxBody
from syncd.sandbox.values import ulid


class Action(StrEnum):
    """The action that replaces the normal answer; `accept_then_...` handles the request first."""

    ANSWER = "answer"
    CUT = "cut"
    TIMEOUT = "timeout"
    ACCEPT_THEN_CUT = "accept_then_cut"
    ACCEPT_THEN_TIMEOUT = "accept_then_timeout"


class Fault(SandboxBody):
    """The body of POST /sandbox/v1/faults.

    A request fault names `path`, `method`, both or neither (then it matches all requests outside /sandbox).
    An event fault names an `event_id`, and that event is refused with `status`, as by a server that fails in
    the middle of a batch: the events before it are stored. `count` limits how often the fault triggers
    (default: until cleared); `retry_after` is in seconds. A `timeout` lasts until the client gives up.
    """

    path: str | None = None
    method: str | None = None
    event_id: str | None = None
    action: Action = Action.ANSWER
    status: int = Field(default=503, ge=400, le=599)
    retry_after: int | None = None
    count: int | None = Field(default=None, ge=1)

    def matches(self, method: str, path: str) -> bool:
        """Return whether this fault applies to a request."""
        return (
            self.event_id is None
            and self.path in (None, path)
            and self.method in (None, method)
            and not path.startswith("/sandbox/")
        )


class Lag(SandboxBody):
    """The body of PUT /sandbox/v1/lag: lists of customers show a new one only after so many seconds."""

    seconds: float = Field(default=0, ge=0)


class Faults:
    """The active faults, oldest first; thread-safe. `lag` is that of the lists of customers."""

    def __init__(self) -> None:
        self.lag = Lag()
        self._lock = Lock()
        self._faults: dict[str, Fault] = {}
        self._hits: dict[str, int] = {}

    def add(self, fault: Fault) -> dict[str, Any]:
        """Add a fault and return its description, as `describe` does."""
        with self._lock:
            fault_id = ulid()
            self._faults[fault_id] = fault
            self._hits[fault_id] = 0
            return self._described(fault_id)

    def clear(self) -> None:
        """Remove all faults and the lag."""
        self.lag = Lag()
        with self._lock:
            self._faults.clear()
            self._hits.clear()

    def describe(self) -> list[dict[str, Any]]:
        """List the faults added since the last clearing, exhausted ones too, with `id` and `hits`."""
        with self._lock:
            return [self._described(fault_id) for fault_id in self._faults]

    def take(self, method: str, path: str) -> Fault | None:
        """Consume and return one occurrence of the first fault that matches the request."""
        with self._lock:
            for fault_id, fault in self._faults.items():
                if fault.matches(method, path) and self._use(fault_id, fault):
                    return fault
        return None

    def poison(self) -> dict[str, int]:
        """Return the ids of the events to refuse, and the status for each."""
        with self._lock:
            return {
                fault.event_id: fault.status
                for fault_id, fault in self._faults.items()
                if fault.event_id is not None and self._is_left(fault_id, fault)
            }

    def event_refused(self, event_id: str) -> None:
        """Consume one occurrence of the faults of an event."""
        with self._lock:
            for fault_id, fault in self._faults.items():
                if fault.event_id == event_id:
                    self._use(fault_id, fault)

    def _is_left(self, fault_id: str, fault: Fault) -> bool:
        return fault.count is None or self._hits[fault_id] < fault.count

    def _use(self, fault_id: str, fault: Fault) -> bool:
        if not self._is_left(fault_id, fault):
            return False
        self._hits[fault_id] += 1
        return True

    def _described(self, fault_id: str) -> dict[str, Any]:
        return {
            "id": fault_id,
            **self._faults[fault_id].model_dump(exclude_none=True),
            "hits": self._hits[fault_id],
        }
