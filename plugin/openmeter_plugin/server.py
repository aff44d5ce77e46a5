"""Serving Kong: one protocol object per connection, on the event loop of the worker process.

When a connection is closed decides whether events are lost (facts measured on Kong 3.9.1): Kong sends an
event again when the connection closed under it, and never otherwise. So an event for an instance that we
do not know, and that no server before us has left on disk, closes the connection, the only signal that the
protocol has: Kong starts the instance and sends the event again. A bad record never does, or Kong would send
it for ever. What a stop does with connections is in `draining`.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from openmeter_plugin import wire
from openmeter_plugin.connections import Link
from openmeter_plugin.event_call import QUESTIONS, Event, lenient_answer, lenient_text
from openmeter_plugin.instance_calls import InstanceCalls
from openmeter_plugin.instance_files import InstanceFiles
from openmeter_plugin.instances import Instance, Instances
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.outcome import spool_record
from openmeter_plugin.peers import Peers
from openmeter_plugin.questions import Needs
from openmeter_plugin.serialized_log import parse_log
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import STALLED_AFTER, SpoolWriter

_LENGTH: Final = struct.Struct("<I")
_MOST_EVENT_CALLS: Final = 10_000


class Server:
    """What the connections of a worker share."""

    def __init__(
        self,
        instances: Instances,
        writer: SpoolWriter,
        loop: asyncio.AbstractEventLoop,
        peers: Peers | None = None,
        files: InstanceFiles | None = None,
    ) -> None:
        self.instances = instances
        self._writer = writer
        self.instance_calls = InstanceCalls(instances, loop, peers, files)
        self.clock = itertools.count(1)
        self._handed_over: list[Item] = []
        self._stalled = False
        self.event_calls: dict[bytes, int] = {}
        self.connections: set[Connection] = set()
        self.log = get_logger()
        self.bad_stream_limit = RateLimit()
        self.unexpected_limit = RateLimit()

    def remember_event_call(self, body: bytes, instance_id: int) -> None:
        """Remember what the encoded call of an instance's events says, so that it is decoded once."""
        if len(self.event_calls) >= _MOST_EVENT_CALLS:
            self.event_calls.clear()
        self.event_calls[body] = instance_id

    def connection(self, link: Link) -> Connection:
        """Return what handles a new connection."""
        return Connection(self, link)

    def hand_over(self, queue: SpoolQueue, record: bytes, event: Event) -> None:
        """Bring a record to the spool at the end of this round."""
        self._handed_over.append((queue, record, event, None))

    def flush(self) -> None:
        """Bring what was handed over in this round to the spool, and answer for what is there already."""
        items = self._handed_over
        if not items:
            return
        self._handed_over = []
        if self._stalled:
            self._writer.keep_for_later(items)
            self.committed([item[2] for item in items])
            return
        written, left = self._writer.append_now(items)
        if left:
            self._writer.append_all(left)
        self.committed(written)

    def look_at_disk(self) -> None:
        """While the disk hangs, answer Kong all the same, which drops what exceeds 4096 unanswered events."""
        if self._stalled and not self._writer.stalled:
            self._writer.moves_again()
            self.log.warning("spool_moves_again")
        elif not self._stalled and self._writer.stalled:
            self.log.critical(
                "spool_stalled",
                seconds=STALLED_AFTER,
                consequence="usage waits in memory, where a kill or a crash loses it",
            )
        self._stalled = self._writer.stalled
        if self._stalled:
            events = [c.event for c in self.connections if c.event is not None and c.event.handed_over]
            self.committed(events)

    @staticmethod
    def committed(tokens: Iterable[Any]) -> None:
        """Give Kong its answers for records that are on disk now; the tokens are events."""
        for token in tokens:
            token.answer()


class Connection:
    """One connection of Kong: frames in, calls answered, events brought to the spool."""

    __slots__ = (
        "_chunks",
        "_is_shut_down",
        "_link",
        "_missing",
        "_server",
        "event",
        "finish",
        "under_way",
        "used",
        "was_called_late",
        "write",
    )

    def __init__(self, server: Server, link: Link) -> None:
        self._server = server
        self._link = link
        self.write: Callable[[bytes], None] = link.write
        self.finish: Callable[[bytes], None] = link.finish
        self._chunks: list[bytes] = []  # of a frame that is not complete, joined once when it is
        self._missing = 0
        self.event: Event | None = None
        self.under_way = False
        """Whether Kong waits for an instance: one that it starts, or that we look for."""
        self.used = 0
        """Higher where the last event came later."""
        self._is_shut_down = False
        self.was_called_late = False
        """Whether Kong called on it after it was shut down."""
        server.connections.add(self)

    @property
    def peer(self) -> int:
        """The pid of the nginx worker at the other end, 0 where that is not ours to see."""
        return self._link.peer()

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return self in self._server.connections

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way on it."""
        busy = self.event is not None or self.under_way or bool(self._chunks) or self._link.has_unsent
        return not busy and not self._is_shut_down

    @property
    def has_unread(self) -> bool:
        """Whether Kong has called already, or closed it."""
        return self._link.has_unread

    def shut_down(self) -> None:
        """End our side of it, and close it when Kong has: what Kong calls now, it sends again elsewhere."""
        if not self._is_shut_down:
            self._is_shut_down = True
            self._link.shut_down()

    def lost(self) -> None:
        """Forget the connection; a record that is on its way to the disk still goes there."""
        self._server.connections.discard(self)
        event = self.event
        if event is not None and event.asked is not None and not event.handed_over:
            # Kong broke off over a question, and will not send this event again. Kong 3.9 does with the
            # traditional router, for a path with a named capture that took no part in the match.
            event.answers = event.answers.without_the_rest()
            self._take(event)

    def close(self) -> None:
        """Close the connection."""
        if self.event is not None and not self.event.handed_over:
            self.event = None  # Kong will send it again
        self._link.close()

    def received(self, data: bytes) -> None:
        """Take bytes of the stream and handle each frame that is complete."""
        if self._chunks:
            self._chunks.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._chunks)
            self._chunks = []
        try:
            rest = self._frames(data)
        except wire.WireError as error:
            self._end(str(error))
        except Exception:
            if self._server.unexpected_limit.passes():
                self._server.log.exception("connection_failed")
            self.close()
        else:
            if rest:
                self._chunks = [rest]

    def _frames(self, data: bytes) -> bytes:
        """Handle each complete frame and return what is left; raises WireError."""
        at, end = 0, len(data)
        if end >= 4 and _LENGTH.unpack_from(data)[0] == end - 4:  # the usual: one frame, whole
            self._frame(data[4:])
            return b""
        while end - at >= 4:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > wire.MAX_FRAME:
                raise wire.WireError("a frame is longer than 64 MiB")
            stop = at + 4 + length
            if stop > end:
                self._missing = stop - end
                return data[at:]
            self._frame(data[at + 4 : stop])
            at = stop
        self._missing = 4 - (end - at)
        return data[at:]

    def _end(self, reason: str) -> None:
        if self._server.bad_stream_limit.passes():
            self._server.log.error(
                "connection_closed",
                reason=reason,
                not_told=self._server.bad_stream_limit.held_back(),
            )
        self._chunks = []
        self.close()

    def _frame(self, frame: bytes) -> None:
        if self._is_shut_down:
            # Whole, so Kong reads next, and finds the end of the stream: it is closed without a reset.
            self.was_called_late = True
            self.close()
        elif self.under_way:
            raise wire.WireError("a frame came before the answer to the one before it")
        elif self.event is None:
            self._call(frame)
        else:
            self._pdk_answer(self.event, frame)

    def _call(self, frame: bytes) -> None:
        split = wire.split_call(frame)
        if split is not None:
            sequence, body = split
            instance_id = self._server.event_calls.get(body)
            if instance_id is not None:
                self._begin(sequence, instance_id)
                return
        call = wire.decode_call(frame)
        if isinstance(call, wire.HandleEvent):
            if split is not None:
                self._server.remember_event_call(split[1], call.instance_id)
            self._begin(wire.encode_varint(call.sequence), call.instance_id)
        elif isinstance(call, wire.StartInstance):
            self._server.instance_calls.start(call, self)
        else:
            self._server.instance_calls.close(call.instance_id)
            self.finish(wire.encode_return(call.sequence))

    def _begin(self, sequence: bytes, instance_id: int) -> None:
        instance = self._server.instances.get(instance_id)
        if instance is None:
            self._server.instance_calls.find(instance_id, self, sequence)
        else:
            self.begin(sequence, instance)

    def begin(self, sequence: bytes, instance: Instance) -> None:
        """Begin an event: ask for the log."""
        self.used = next(self._server.clock)
        self.event = Event(self, sequence, instance)
        self.write(wire.ASK_FOR_LOG)

    def refuse(self, instance_id: int) -> None:
        """Close the connection over an event of an instance that is not known."""
        self._end(f"instance {instance_id} is unknown here, Kong will start it again")

    def _pdk_answer(self, event: Event, frame: bytes) -> None:
        if event.handed_over:
            raise wire.WireError("a frame came before the answer to the one before it")
        if event.asked is None:
            usual = event.instance.usual
            raw = lenient_text(frame)
            record = usual.record(raw) if usual is not None and raw is not None else None
            if record is not None:
                event.handed_over = True
                self._server.hand_over(event.instance.queue, record, event)
                return
            event.log = None if raw is None else parse_log(raw)
        else:
            event.answers = event.answers.with_answer(event.asked, lenient_answer(event.asked, frame))
        self._take(event)

    def _take(self, event: Event) -> None:
        """Bring the event's record to the spool, or ask Kong for what is missing to make it."""
        spooled = spool_record(event.instance, event.log, event.answers)
        if isinstance(spooled, Needs):
            event.asked = spooled
            self.write(QUESTIONS[spooled][0])
            return
        event.handed_over = True
        event.log = None
        queue, record = spooled
        self._server.hand_over(queue, record, event)
