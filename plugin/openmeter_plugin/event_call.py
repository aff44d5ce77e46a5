"""An event that Kong hands over, while it is under way: what Kong is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from openmeter_plugin import wire
from openmeter_plugin.instances import Instance
from openmeter_plugin.questions import NOTHING_ASKED, Needs

QUESTIONS: Final[Mapping[Needs, tuple[bytes, Callable[[bytes], object]]]] = {
    Needs.APPLICATION: (wire.ASK_FOR_APPLICATION, wire.decode_value),
    Needs.CAPTURES: (wire.ASK_FOR_CAPTURES, wire.decode_captures),
}
"""How Kong is asked, and how its answer is read."""


class Caller(Protocol):
    """The connection that an event is on."""

    event: Event | None
    finish: Callable[[bytes], None]


class Event:
    """The event that a connection is in: Kong answers our questions before it sends anything else.

    It is the token of its record too: an answer that comes late, because the disk hung, must not be taken
    for that of the connection's next event.
    """

    __slots__ = ("answers", "asked", "connection", "handed_over", "instance", "log", "sequence")

    def __init__(self, connection: Caller, sequence: bytes, instance: Instance) -> None:
        self.connection = connection
        self.sequence = sequence
        self.instance = instance
        self.asked: Needs | None = None  # what Kong is asked beside the log, while it is
        self.answers = NOTHING_ASKED
        self.handed_over = False
        self.log: Any = None

    def answer(self) -> None:
        """Tell Kong that the event is done, once."""
        connection = self.connection
        if connection.event is self:
            connection.event = None
            connection.finish(wire.encode_event_end(self.sequence))


def lenient_text(frame: bytes) -> bytes | None:
    """Return the serialized log in Kong's answer, or None: a bad record is counted, never a close."""
    try:
        return wire.decode_string(frame)
    except wire.WireError:
        return None


def lenient_answer(need: Needs, frame: bytes) -> object:
    """Return what Kong answered to a question beside the log, or None where that is no answer."""
    try:
        return QUESTIONS[need][1](frame)
    except wire.WireError:
        return None
