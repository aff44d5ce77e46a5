"""Server of Kong's plugin protocol: handles the calls of all connections on a worker's event loop.

`Server` holds what the connections of a worker share, `Connection` handles one connection's frames, `Event`
is the event that a connection is handling, and `InstanceCalls` starts, finds and closes plugin instances.

Whether an event is lost depends on when its connection is closed (measured on Kong 3.9.1): Kong resends an
event if the connection ended under it, and never otherwise. So an event for an instance that is unknown, and
that no earlier server has left on disk, closes its connection, which is the only signal that the protocol
has: Kong starts the instance and resends the event. A bad record never closes it, or Kong would resend it
forever. `shutdown` has what a stop does with connections.
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
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, PdkQuery
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import STALLED_AFTER, SpoolWriter

PDK_QUERIES: Final[Mapping[PdkQuery, tuple[bytes, Callable[[bytes], object]]]] = {
    PdkQuery.APPLICATION: (codec.QUERY_APPLICATION, codec.decode_value),
    PdkQuery.CAPTURES: (codec.QUERY_CAPTURES, codec.decode_captures),
}
"""For each query, the frames that ask Kong and the decoder of its answer."""

_LENGTH: Final = struct.Struct("<I")
_MAX_EVENT_CALLS: Final = 10_000


class Server:
    """The state that the connections of a worker share."""

    def __init__(
        self,
        instances: Instances,
        writer: SpoolWriter,
        loop: asyncio.AbstractEventLoop,
        worker_sync: WorkerSync | None = None,
        files: InstanceFiles | None = None,
    ) -> None:
        self.instances = instances
        self._writer = writer
        self.instance_calls = InstanceCalls(instances, loop, worker_sync, files)
        self.use_counter = itertools.count(1)
        self._handed_over: list[Item] = []
        self._stalled = False
        self.event_calls: dict[bytes, int] = {}
        self.connections: set[Connection] = set()
        self.log = get_logger()
        self.bad_stream_limit = RateLimit()
        self.unexpected_limit = RateLimit()

    def remember_event_call(self, body: bytes, instance_id: int) -> None:
        """Remember the instance of an encoded event call, so that equal calls need no decoding."""
        if len(self.event_calls) >= _MAX_EVENT_CALLS:
            self.event_calls.clear()
        self.event_calls[body] = instance_id

    def connection(self, link: Link) -> Connection:
        """Return the handler of a new connection."""
        return Connection(self, link)

    def hand_over(self, queue: SpoolQueue, record: bytes, event: Event) -> None:
        """Queue a record to be written to the spool at the end of this round."""
        self._handed_over.append((queue, record, event, None))

    def flush(self) -> None:
        """Write the records of this round to the spool, and answer the events that are on disk already."""
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

    def check_disk(self) -> None:
        """Answer Kong anyway while the disk hangs: Kong drops what exceeds 4096 unanswered events."""
        if self._stalled and not self._writer.stalled:
            self._writer.end_stall()
            self.log.warning("spool_recovered")
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
        """Answer Kong for records that are on disk; the tokens are their events."""
        for token in tokens:
            token.answer()


class Connection:
    """One of Kong's connections: splits its stream into frames, answers calls and spools events."""

    __slots__ = (
        "_chunks",
        "_is_shut_down",
        "_link",
        "_missing",
        "_server",
        "awaits_instance",
        "called_after_shutdown",
        "event",
        "finish",
        "last_used",
        "write",
    )

    def __init__(self, server: Server, link: Link) -> None:
        self._server = server
        self._link = link
        self.write: Callable[[bytes], None] = link.write
        self.finish: Callable[[bytes], None] = link.finish
        self._chunks: list[bytes] = []  # of an incomplete frame, joined once when it is complete
        self._missing = 0
        self.event: Event | None = None
        self.awaits_instance = False
        """Whether Kong is waiting for an instance that is being started or looked for."""
        self.last_used = 0
        """Higher on connections whose last event came later."""
        self._is_shut_down = False
        self.called_after_shutdown = False
        """Whether Kong made a call on the connection after it was shut down."""
        server.connections.add(self)

    @property
    def peer_pid(self) -> int:
        """The pid of the nginx worker at the other end, 0 if it cannot be read."""
        return self._link.peer_pid()

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return self in self._server.connections

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way on it."""
        busy = self.event is not None or self.awaits_instance or bool(self._chunks) or self._link.has_unsent
        return not busy and not self._is_shut_down

    @property
    def has_unread(self) -> bool:
        """Whether Kong has made a call that was not read yet, or has closed it."""
        return self._link.has_unread

    def shut_down(self) -> None:
        """End our side, and close it after Kong has: an event that Kong sends now, it resends elsewhere."""
        if not self._is_shut_down:
            self._is_shut_down = True
            self._link.shut_down()

    def close(self) -> None:
        """Close the connection."""
        if self.event is not None and not self.event.handed_over:
            self.event = None  # Kong will resend it
        self._link.close()

    def lost(self) -> None:
        """Forget the connection; a record that was handed over is still written to the disk."""
        self._server.connections.discard(self)
        event = self.event
        if event is not None and event.pending_query is not None and not event.handed_over:
            # Kong failed over a query and will not resend this event. Kong 3.9 does so with the traditional
            # router, for a path with a named capture that took no part in the match.
            event.query_results = event.query_results.completed()
            self._spool(event)

    # Frames

    def received(self, data: bytes) -> None:
        """Take bytes of the stream and handle each complete frame."""
        if self._chunks:
            self._chunks.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._chunks)
            self._chunks = []
        try:
            rest = self._frames(data)
        except codec.ProtocolError as error:
            self._close_bad_stream(str(error))
        except Exception:
            if self._server.unexpected_limit.passes():
                self._server.log.exception("connection_failed")
            self.close()
        else:
            if rest:
                self._chunks = [rest]

    def _frames(self, data: bytes) -> bytes:
        """Handle each complete frame and return the rest; raises ProtocolError."""
        at, end = 0, len(data)
        if end >= 4 and _LENGTH.unpack_from(data)[0] == end - 4:  # fast path: exactly one frame
            self._frame(data[4:])
            return b""
        while end - at >= 4:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > codec.MAX_FRAME:
                raise codec.ProtocolError("a frame is longer than 64 MiB")
            stop = at + 4 + length
            if stop > end:
                self._missing = stop - end
                return data[at:]
            self._frame(data[at + 4 : stop])
            at = stop
        self._missing = 4 - (end - at)
        return data[at:]

    def _frame(self, frame: bytes) -> None:
        if self._is_shut_down:
            # The frame is read whole, so Kong reads next and finds the end of the stream, without a reset.
            self.called_after_shutdown = True
            self.close()
        elif self.awaits_instance:
            raise codec.ProtocolError("a frame came before the answer to the previous one")
        elif self.event is None:
            self._call(frame)
        else:
            self._pdk_answer(self.event, frame)

    def _close_bad_stream(self, reason: str) -> None:
        if self._server.bad_stream_limit.passes():
            self._server.log.error(
                "connection_closed",
                reason=reason,
                suppressed=self._server.bad_stream_limit.suppressed(),
            )
        self._chunks = []
        self.close()

    # Calls

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
        """Begin an event: ask Kong for the log."""
        self.last_used = next(self._server.use_counter)
        self.event = Event(self, sequence, instance)
        self.write(codec.QUERY_LOG)

    def refuse(self, instance_id: int) -> None:
        """Close the connection because an event's instance is unknown."""
        self._close_bad_stream(f"instance {instance_id} is unknown here, Kong will start it again")

    def _pdk_answer(self, event: Event, frame: bytes) -> None:
        if event.handed_over:
            raise codec.ProtocolError("a frame came before the answer to the previous one")
        if event.pending_query is None:
            event.log = _decode_log(frame)
        else:
            result = _decode_result(event.pending_query, frame)
            event.query_results = event.query_results.with_result(event.pending_query, result)
        self._spool(event)

    def _spool(self, event: Event) -> None:
        """Hand the event's record over to the spool, or send Kong the query that it still needs."""
        record = spool_record(event.instance, event.log, event.query_results)
        if isinstance(record, PdkQuery):
            event.pending_query = record
            self.write(PDK_QUERIES[record][0])
            return
        event.handed_over = True
        event.log = b""
        queue, encoded = record
        self._server.hand_over(queue, encoded, event)


class Event:
    """The event that a connection is handling; Kong answers its queries before it sends anything else.

    It is also the token of its record: a late answer, after the disk hung, must not be taken for the answer
    to the connection's next event.
    """

    __slots__ = ("connection", "handed_over", "instance", "log", "pending_query", "query_results", "sequence")

    def __init__(self, connection: Connection, sequence: bytes, instance: Instance) -> None:
        self.connection = connection
        self.sequence = sequence
        self.instance = instance
        self.pending_query: PdkQuery | None = None  # the query that Kong is answering; None for the log
        self.query_results = NO_RESULTS
        self.handed_over = False
        self.log = b""

    def answer(self) -> None:
        """Answer Kong that the event is done, once."""
        connection = self.connection
        if connection.event is self:
            connection.event = None
            connection.finish(codec.encode_event_end(self.sequence))


class InstanceCalls:
    """Starts, finds and closes instances, here, in the other workers and on disk for later servers."""

    def __init__(
        self,
        instances: Instances,
        loop: asyncio.AbstractEventLoop,
        worker_sync: WorkerSync | None,
        files: InstanceFiles | None,
    ) -> None:
        self._instances = instances
        self._loop = loop
        self._worker_sync = worker_sync
        self._files = files
        self._finder = InstanceFinder(files, instances, loop) if files is not None else None
        self._starting: set[asyncio.Task[None]] = set()

    def start(self, call: codec.StartInstance, caller: Connection) -> None:
        """Start an instance, and answer once the other workers know it too."""
        instance = self._instances.start(call.config)
        if self._files is not None:
            self._files.save(instance.id, call.config)
        status = codec.encode_instance_status(call.sequence, call.name, instance.id, started_at())
        if self._worker_sync is None:
            caller.finish(status)
            return
        worker_sync = self._worker_sync
        caller.awaits_instance = True

        async def announce() -> None:
            await worker_sync.announce(instance.id, call.config)
            caller.awaits_instance = False
            caller.finish(status)

        task = self._loop.create_task(announce())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    def find(self, instance_id: int, caller: Connection, sequence: bytes) -> None:
        """Look for an unknown instance on disk, and begin the event that waits for it or refuse it."""

        def found(instance: Instance | None) -> None:
            caller.awaits_instance = False
            if not caller.is_open:
                return
            if instance is None:
                caller.refuse(instance_id)
            else:
                caller.begin(sequence, instance)

        caller.awaits_instance = True
        if self._finder is None:
            found(None)
        else:
            self._finder.find(instance_id, found)

    def close(self, instance_id: int) -> None:
        """Close an instance here, in the other workers and on disk."""
        self._instances.close(instance_id)
        if self._files is not None:
            self._files.remove(instance_id)
        if self._worker_sync is not None:
            self._worker_sync.announce_close(instance_id)


def _decode_log(frame: bytes) -> bytes:
    """Return the serialized log in Kong's answer, or b"": a bad record is counted and closes nothing."""
    try:
        return codec.decode_string(frame)
    except codec.ProtocolError:
        return b""


def _decode_result(query: PdkQuery, frame: bytes) -> object:
    """Return Kong's answer to a query, or None if it cannot be decoded."""
    try:
        return PDK_QUERIES[query][1](frame)
    except codec.ProtocolError:
        return None
