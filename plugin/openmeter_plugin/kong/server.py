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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from openmeter_plugin.instances.instance import Instance, Instances, started_at
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.instances.store import InstanceFiles, InstanceFinder
from openmeter_plugin.instances.worker_sync import WorkerSync
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.connections import Link
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.lenient_json import parse_log
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, PdkQuery
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import STALLED_AFTER, SpoolWriter

# MERGED: An event that Kong hands over, while it is under way: what Kong is asked, and what it answers.

PDK_QUERIES: Final[Mapping[PdkQuery, tuple[bytes, Callable[[bytes], object]]]] = {
    PdkQuery.APPLICATION: (codec.QUERY_APPLICATION, codec.decode_value),
    PdkQuery.CAPTURES: (codec.QUERY_CAPTURES, codec.decode_captures),
}
"""How Kong is asked, and how its answer is read."""


class Event:
    """The event that a connection is in: Kong answers our questions before it sends anything else.

    It is the token of its record too: an answer that comes late, because the disk hung, must not be taken
    for that of the connection's next event.
    """

    __slots__ = ("answers", "asked", "connection", "handed_over", "instance", "log", "sequence")

    def __init__(self, connection: Connection, sequence: bytes, instance: Instance) -> None:
        self.connection = connection
        self.sequence = sequence
        self.instance = instance
        self.asked: PdkQuery | None = None  # what Kong is asked beside the log, while it is
        self.answers = NO_RESULTS
        self.handed_over = False
        self.log: Any = None

    def answer(self) -> None:
        """Tell Kong that the event is done, once."""
        connection = self.connection
        if connection.event is self:
            connection.event = None
            connection.finish(codec.encode_event_end(self.sequence))


def lenient_text(frame: bytes) -> bytes | None:
    """Return the serialized log in Kong's answer, or None: a bad record is counted, never a close."""
    try:
        return codec.decode_string(frame)
    except codec.WireError:
        return None


def lenient_answer(need: PdkQuery, frame: bytes) -> object:
    """Return what Kong answered to a question beside the log, or None where that is no answer."""
    try:
        return PDK_QUERIES[need][1](frame)
    except codec.WireError:
        return None


# MERGED: What Kong asks of instances: to start one, to close one, and whether the one of an event is known.


class InstanceCalls:
    """Starts, finds and closes instances, together with the other workers and the servers to come."""

    def __init__(
        self,
        instances: Instances,
        loop: asyncio.AbstractEventLoop,
        peers: WorkerSync | None,
        files: InstanceFiles | None,
    ) -> None:
        self._instances = instances
        self._loop = loop
        self._peers = peers
        self._files = files
        self._finder = InstanceFinder(files, instances, loop) if files is not None else None
        self._starting: set[asyncio.Task[None]] = set()

    def start(self, call: codec.StartInstance, caller: Connection) -> None:
        """Start an instance and answer, once the other workers know it too."""
        instance = self._instances.start(call.config)
        if self._files is not None:
            self._files.keep(instance.id, call.config)
        status = codec.encode_instance_status(call.sequence, call.name, instance.id, started_at())
        if self._peers is None:
            caller.finish(status)
            return
        peers = self._peers
        caller.under_way = True

        async def announce() -> None:
            await peers.announce(instance.id, call.config)
            caller.under_way = False
            caller.finish(status)

        task = self._loop.create_task(announce())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    def find(self, instance_id: int, caller: Connection, sequence: bytes) -> None:
        """Have an event of an instance that is not known here wait until we know what others left of it."""

        def found(instance: Instance | None) -> None:
            caller.under_way = False
            if not caller.is_open:
                return
            if instance is None:
                caller.refuse(instance_id)
            else:
                caller.begin(sequence, instance)

        caller.under_way = True
        if self._finder is None:
            found(None)
        else:
            self._finder.find(instance_id, found)

    def close(self, instance_id: int) -> None:
        """Close an instance, here and with the other workers."""
        self._instances.close(instance_id)
        if self._files is not None:
            self._files.forget(instance_id)
        if self._peers is not None:
            self._peers.announce_close(instance_id)


_LENGTH: Final = struct.Struct("<I")
_MAX_EVENT_CALLS: Final = 10_000


class Server:
    """What the connections of a worker share."""

    def __init__(
        self,
        instances: Instances,
        writer: SpoolWriter,
        loop: asyncio.AbstractEventLoop,
        peers: WorkerSync | None = None,
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
        if len(self.event_calls) >= _MAX_EVENT_CALLS:
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
            self._writer.append_while_stalled(items)
            self.committed([item[2] for item in items])
            return
        written, left = self._writer.append_now(items)
        if left:
            self._writer.append_all(left)
        self.committed(written)

    def look_at_disk(self) -> None:
        """While the disk hangs, answer Kong all the same, which drops what exceeds 4096 unanswered events."""
        if self._stalled and not self._writer.stalled:
            self._writer.end_stall()
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
            event.answers = event.answers.completed()
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
        except codec.WireError as error:
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
            if length > codec.MAX_FRAME:
                raise codec.WireError("a frame is longer than 64 MiB")
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
                not_told=self._server.bad_stream_limit.suppressed(),
            )
        self._chunks = []
        self.close()

    def _frame(self, frame: bytes) -> None:
        if self._is_shut_down:
            # Whole, so Kong reads next, and finds the end of the stream: it is closed without a reset.
            self.was_called_late = True
            self.close()
        elif self.under_way:
            raise codec.WireError("a frame came before the answer to the one before it")
        elif self.event is None:
            self._call(frame)
        else:
            self._pdk_answer(self.event, frame)

    def _call(self, frame: bytes) -> None:
        split = codec.split_call(frame)
        if split is not None:
            sequence, body = split
            instance_id = self._server.event_calls.get(body)
            if instance_id is not None:
                self._begin(sequence, instance_id)
                return
        call = codec.decode_call(frame)
        if isinstance(call, codec.HandleEvent):
            if split is not None:
                self._server.remember_event_call(split[1], call.instance_id)
            self._begin(codec.encode_varint(call.sequence), call.instance_id)
        elif isinstance(call, codec.StartInstance):
            self._server.instance_calls.start(call, self)
        else:
            self._server.instance_calls.close(call.instance_id)
            self.finish(codec.encode_return(call.sequence))

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
        self.write(codec.QUERY_LOG)

    def refuse(self, instance_id: int) -> None:
        """Close the connection over an event of an instance that is not known."""
        self._end(f"instance {instance_id} is unknown here, Kong will start it again")

    def _pdk_answer(self, event: Event, frame: bytes) -> None:
        if event.handed_over:
            raise codec.WireError("a frame came before the answer to the one before it")
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
            event.answers = event.answers.with_result(event.asked, lenient_answer(event.asked, frame))
        self._take(event)

    def _take(self, event: Event) -> None:
        """Bring the event's record to the spool, or ask Kong for what is missing to make it."""
        spooled = spool_record(event.instance, event.log, event.answers)
        if isinstance(spooled, PdkQuery):
            event.asked = spooled
            self.write(PDK_QUERIES[spooled][0])
            return
        event.handed_over = True
        event.log = None
        queue, record = spooled
        self._server.hand_over(queue, record, event)
