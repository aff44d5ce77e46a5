"""The states of a connection and of an instance, and what leads from one to the next.

`CONNECTION` is what `server.Connection` follows: a signal that its state does not list is a mistake of the
peer, and ends the connection. `INSTANCE` is what happens to an instance id in one worker. The documentation's
diagrams are made from these tables (`python -m tests.state_diagrams`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """What a connection is doing. Kong sends one call at a time on it."""

    IDLE = "idle"
    WAITING = "waiting"
    """Kong waits for an instance that is being started or looked for."""
    LOGGING = "logging"
    """Kong was asked for the log of a request."""
    QUERYING = "querying"
    """Kong was asked for something that the log does not hold."""
    SPOOLING = "spooling"
    """The record of the request is on its way to the disk."""
    ENDED = "ended"
    """Our side is shut down; Kong closes its own as soon as it sees that."""
    CLOSED = "closed"


class Signal(StrEnum):
    """What happens on a connection."""

    START = "StartInstance"
    STARTED = "instance started"
    SEARCH = "event of an unknown instance"
    EVENT = "event"
    QUERY = "query needed"
    RECORD = "record made"
    COMMIT = "record on disk"
    END = "server stops"
    CLOSE = "connection closed"


CONNECTION: Final[Mapping[Signal, Mapping[State, State]]] = {
    Signal.START: {State.IDLE: State.WAITING},
    Signal.STARTED: {State.WAITING: State.IDLE},
    Signal.SEARCH: {State.IDLE: State.WAITING},
    Signal.EVENT: {State.IDLE: State.LOGGING, State.WAITING: State.LOGGING},
    Signal.QUERY: {State.LOGGING: State.QUERYING, State.QUERYING: State.QUERYING},
    Signal.RECORD: {State.LOGGING: State.SPOOLING, State.QUERYING: State.SPOOLING},
    Signal.COMMIT: {State.SPOOLING: State.IDLE},
    Signal.END: {state: State.ENDED for state in State if state not in (State.ENDED, State.CLOSED)},
    Signal.CLOSE: {state: State.CLOSED for state in State if state is not State.CLOSED},
}
"""For each signal, the states in which it may come, and where each leads."""


class InstanceState(StrEnum):
    """What a worker knows about an instance id."""

    UNKNOWN = "unknown"
    SEARCHED = "searched"
    """Events of it wait for its file."""
    SERVED = "served"


class InstanceSignal(StrEnum):
    """What happens to an instance id."""

    START = "StartInstance"
    ANNOUNCED = "announced by another worker"
    EVENT = "event"
    FOUND = "file found"
    MISSING = "no valid file in time, so that Kong starts it again"
    CLOSE = "CloseInstance"
    UNUSED = "no event for one to two hours"


INSTANCE: Final[Mapping[InstanceSignal, Mapping[InstanceState, InstanceState]]] = {
    InstanceSignal.START: {InstanceState.UNKNOWN: InstanceState.SERVED},
    InstanceSignal.ANNOUNCED: {InstanceState.UNKNOWN: InstanceState.SERVED},
    InstanceSignal.EVENT: {
        InstanceState.UNKNOWN: InstanceState.SEARCHED,
        InstanceState.SEARCHED: InstanceState.SEARCHED,
        InstanceState.SERVED: InstanceState.SERVED,
    },
    InstanceSignal.FOUND: {InstanceState.SEARCHED: InstanceState.SERVED},
    InstanceSignal.MISSING: {InstanceState.SEARCHED: InstanceState.UNKNOWN},
    InstanceSignal.CLOSE: {InstanceState.SERVED: InstanceState.UNKNOWN},
    InstanceSignal.UNUSED: {InstanceState.SERVED: InstanceState.UNKNOWN},
}
