"""Server of Kong's plugin protocol: handles the calls of all connections on a worker's event loop.

`Server` holds what the connections of a worker share, `Connection` handles one connection's frames and the
event that is under way on it, by the table in `states`, and `InstanceCalls` starts, finds and closes plugin
instances.

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
from itertools import islice
from typing import Final

from openmeter_plugin.instances.instance import Instance, Instances, started_at
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.instances.store import InstanceFiles, InstanceFinder
from openmeter_plugin.instances.worker_sync import WorkerSync
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.connections import Link
from openmeter_plugin.kong.states import CONNECTION, Signal, State
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.kong_log import NO_RESULTS, PdkQuery
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

PDK_QUERIES: Final[Mapping[PdkQuery, tuple[bytes, Callable[[bytes], object]]]] = {
    PdkQuery.APPLICATION: (codec.QUERY_APPLICATION, codec.decode_value),
    PdkQuery.CAPTURES: (codec.QUERY_CAPTURES, codec.decode_captures),
}
"""For each query, the frames that ask Kong and the decoder of its answer."""

Token = tuple["Connection", int]
"""An event: its connection, and the number of the event."""

_LENGTH: Final = struct.Struct("<I")
_MAX_EVENT_CALLS: Final = 10_000
_MAX_EVENT_CALL: Final = 256
"""Bytes of an event call that is remembered; Kong's have some twenty."""
MAX_INCOMPLETE: Final = 96 * 1024 * 1024
"""Bytes of incomplete frames that all connections may hold together. A frame of the largest size fits."""
_SPARE_DIVISOR: Final = 16

# The steps of an ordinary event, looked up once.
_ON_EVENT: Final = CONNECTION[Signal.EVENT]
_ON_RECORD: Final = CONNECTION[Signal.RECORD]
_ON_COMMIT: Final = CONNECTION[Signal.COMMIT]
_IDLE: Final = State.IDLE
_LOGGING: Final = State.LOGGING
_SPOOLING: Final = State.SPOOLING


class Server:
    """The state that the connections of a worker share."""

    def __init__(
        self,
        instances: Instances,
        writer: SpoolWriter,
        loop: asyncio.AbstractEventLoop,
        worker_sync: WorkerSync | None = None,
        files: InstanceFiles | None = None,
        *,
        max_incomplete: int = MAX_INCOMPLETE,
    ) -> None:
        self.instances = instances
        self._writer = writer
        self.instance_calls = InstanceCalls(instances, loop, worker_sync, files)
        self.call_numbers = itertools.count(1)
        self._handed_over: list[Item] = []
        self._stalled = False
        self.event_calls: dict[bytes, int] = {}
        self.connections: dict[Connection, None] = {}
        """In the order in which they were accepted."""
        self._incomplete = 0
        self._max_incomplete = max_incomplete
        self._suspects: dict[Connection, object] = {}
        self.stopping = False
        """Whether each connection ends with its next answer."""
        self.log = get_logger()
        self.bad_stream_limit = RateLimit()
        self.unexpected_limit = RateLimit()

    def remember_event_call(self, body: bytes, instance_id: int) -> None:
        """Remember the instance of an encoded event call, so that equal calls need no decoding."""
        if len(body) > _MAX_EVENT_CALL:
            return
        if len(self.event_calls) >= _MAX_EVENT_CALLS:
            self.event_calls.clear()
        self.event_calls[body] = instance_id

    def connection(self, link: Link) -> Connection:
        """Return the handler of a new connection."""
        return Connection(self, link)

    def hand_over(self, queue: SpoolQueue, record: bytes, token: Token) -> None:
        """Queue a record to be written to the spool at the end of this round."""
        self._handed_over.append((queue, record, token, None))

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
                seconds=self._writer.stalled_after,
                consequence="usage waits in memory, where a kill or a crash loses it",
            )
        self._stalled = self._writer.stalled
        if self._stalled:
            self.committed([(c, c.last_used) for c in self.connections if c.state is _SPOOLING])

    def stop(self) -> None:
        """From now on, end each connection with its next answer."""
        self.stopping = True
        for connection in self.connections:
            connection.end_with_answer()

    @staticmethod
    def committed(tokens: Iterable[Token]) -> None:
        """Answer Kong for records that are on disk."""
        for connection, number in tokens:
            # A late answer, after the disk hung, must not be taken for that of the connection's next event.
            if connection.state is _SPOOLING and connection.last_used == number:
                connection.answer()

    # Limits on what peers may hold

    def hold(self, size: int) -> None:
        """Count bytes of incomplete frames; beyond the bound, close the connection with most of them."""
        self._incomplete += size
        if self._incomplete > self._max_incomplete:
            largest = max(self.connections, key=lambda c: c.held)
            largest.close_bad_stream("a frame is large, and incomplete frames take too much memory together")

    def close_stale(self) -> None:
        """Close connections with the same incomplete frame, or still without a call, as at the last check.

        Kong connects only when it has something to send, and sends a frame at once.
        """
        suspects = {c: c.suspicion for c in self.connections if c.suspicion is not None}
        for connection, suspicion in suspects.items():
            if self._suspects.get(connection) is suspicion and not connection.has_unread:
                connection.close_bad_stream("no complete call came in time")
        self._suspects = suspects

    def close_spare(self) -> None:
        """Close some connections to make room: first those without any call, then those idle for longest."""
        number = len(self.connections) // _SPARE_DIVISOR + 1
        unused = (c for c in self.connections if c.state is _IDLE and not c.last_used and not c.has_unread)
        spare = list(islice(unused, number))
        if not spare:
            idle = sorted((c for c in self.connections if c.is_idle), key=lambda c: c.last_used)
            spare = [c for c in idle[:number] if not c.has_unread]
        for connection in spare:
            connection.close_bad_stream("there are too many connections")


class Connection:
    """One of Kong's connections: splits its stream into frames, answers calls and spools events."""

    __slots__ = (
        "_chunks",
        "_instance",
        "_link",
        "_log",
        "_missing",
        "_query",
        "_results",
        "_sequence",
        "_server",
        "_write",
        "called_after_shutdown",
        "finish",
        "held",
        "last_used",
        "state",
    )

    def __init__(self, server: Server, link: Link) -> None:
        self._server = server
        self._link = link
        self._write: Callable[[bytes], None] = link.write
        self.finish: Callable[[bytes], None] = link.finish
        self.state = _IDLE
        self._chunks: list[bytes] = []  # of an incomplete frame, joined once when it is complete
        self._missing = 0
        self.held = 0
        """Bytes of the incomplete frame."""
        self.last_used = 0
        """The number of its last call, 0 before the first; higher on connections that were called later."""
        self.called_after_shutdown = False
        """Whether Kong made a call on the connection after it was shut down."""
        # Of the event under way
        self._sequence = b""
        self._instance: Instance | None = None
        self._log = b""
        self._query: PdkQuery | None = None
        self._results = NO_RESULTS
        if server.stopping:
            self.end_with_answer()
        server.connections[self] = None

    @property
    def peer_pid(self) -> int:
        """The pid of the nginx worker at the other end, 0 if it cannot be read."""
        return self._link.peer_pid()

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return self.state is not State.CLOSED

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way on it."""
        return self.state is _IDLE and not self._chunks and not self._link.has_unsent

    @property
    def is_shut_down(self) -> bool:
        """Whether our side has ended while Kong's is still open."""
        return self.state is State.ENDED

    @property
    def awaits_instance(self) -> bool:
        """Whether Kong is waiting for an instance that is being started or looked for."""
        return self.state is State.WAITING

    @property
    def has_unread(self) -> bool:
        """Whether Kong has made a call that was not read yet, or has closed it."""
        return self._link.has_unread

    @property
    def suspicion(self) -> object | None:
        """What must not stay as it is for long: an incomplete frame, or that no call has come yet."""
        if self._chunks:
            return self._chunks
        return _IDLE if self.state is _IDLE and not self.last_used else None

    def signal(self, signal: Signal) -> None:
        """Enter the next state; raises ProtocolError if the signal is not allowed in this one."""
        following = CONNECTION[signal].get(self.state)
        if following is None:
            raise codec.ProtocolError(f"{signal} in the state {self.state}")
        self.state = following

    def shut_down(self) -> None:
        """End our side, and close it after Kong has: an event that Kong sends now, it resends elsewhere."""
        if self.state is not State.ENDED and self.is_open:
            self.signal(Signal.END)
            self._link.shut_down()

    def end_with_answer(self) -> None:
        """End our side right after the next answer: Kong reads the end with it and drops the connection."""
        finish = self._link.finish

        def finish_and_end(data: bytes) -> None:
            finish(data)
            if not self._link.has_unsent:
                self.shut_down()

        self.finish = finish_and_end

    def close(self) -> None:
        """Close the connection. A record that was handed over is still written; Kong resends other events."""
        if self.is_open:
            self.signal(Signal.CLOSE)
        self._link.close()

    def lost(self) -> None:
        """Forget the connection; a record that was handed over is still written to the disk."""
        self._server.connections.pop(self, None)
        self._release()
        if self.state is State.QUERYING:
            # Kong failed over a query and will not resend this event. Kong 3.9 does so with the traditional
            # router, for a path with a named capture that took no part in the match.
            self._results = self._results.completed()
            self._spool()
        if self.is_open:
            self.signal(Signal.CLOSE)

    def close_bad_stream(self, reason: str) -> None:
        """Close the connection because of what the peer did, and log that."""
        if self._server.bad_stream_limit.passes():
            self._server.log.error(
                "connection_closed",
                reason=reason,
                suppressed=self._server.bad_stream_limit.suppressed(),
            )
        self.close()

    # Frames

    def received(self, data: bytes) -> None:
        """Take bytes of the stream and handle each complete frame."""
        if self._chunks:
            self._missing -= len(data)
            if self._missing > 0:
                self._hold(data)
                return
            self._chunks.append(data)
            data = self._release()
        try:
            rest = self._frames(data)
        except codec.ProtocolError as error:
            self.close_bad_stream(str(error))
        except Exception:
            if self._server.unexpected_limit.passes():
                self._server.log.exception("connection_failed")
            self.close()
        else:
            if rest and self.is_open:
                self._hold(rest)

    def _hold(self, data: bytes) -> None:
        self._chunks.append(data)
        self.held += len(data)
        self._server.hold(len(data))

    def _release(self) -> bytes:
        """Return the bytes of the incomplete frame, which is no longer held."""
        data = b"".join(self._chunks)
        self._server.hold(-self.held)
        self._chunks, self.held = [], 0
        return data

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
        state = self.state
        if state is _LOGGING:
            self._take_log(frame)
        elif state is _IDLE:
            self._call(frame)
        elif state is State.QUERYING:
            self._take_result(frame)
        elif state is State.ENDED:
            # The frame is read whole, so Kong reads next and finds the end of the stream, without a reset.
            self.called_after_shutdown = True
            self.close()
        elif self.is_open:
            raise codec.ProtocolError("a frame came before the answer to the previous one")

    # Calls

    def _call(self, frame: bytes) -> None:
        self.last_used = next(self._server.call_numbers)
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
            self.signal(Signal.SEARCH)
            self._server.instance_calls.find(instance_id, self, sequence)
        else:
            self.begin(sequence, instance)

    def begin(self, sequence: bytes, instance: Instance) -> None:
        """Begin an event: ask Kong for the log."""
        self.state = _ON_EVENT[self.state]
        self._sequence = sequence
        self._instance = instance
        self._write(codec.QUERY_LOG)

    def refuse(self, instance_id: int) -> None:
        """Close the connection because an event's instance is unknown."""
        self.close_bad_stream(f"instance {instance_id} is unknown here, Kong will start it again")

    def _take_log(self, frame: bytes) -> None:
        self._log = _decode_log(frame)
        self._results = NO_RESULTS
        self._spool()

    def _take_result(self, frame: bytes) -> None:
        if self._query is not None:
            self._results = self._results.with_result(self._query, _decode_result(self._query, frame))
        self._spool()

    def _spool(self) -> None:
        """Hand the event's record over to the spool, or send Kong the query that it still needs."""
        if self._instance is None:
            return
        record = spool_record(self._instance, self._log, self._results)
        if isinstance(record, PdkQuery):
            self.signal(Signal.QUERY)
            self._query = record
            self._write(PDK_QUERIES[record][0])
            return
        self.state = _ON_RECORD[self.state]
        self._log = b""
        queue, encoded = record
        self._server.hand_over(queue, encoded, (self, self.last_used))

    def answer(self) -> None:
        """Answer Kong that the event is done."""
        self.state = _ON_COMMIT[self.state]
        self.finish(codec.encode_event_end(self._sequence))


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
        caller.signal(Signal.START)

        async def announce() -> None:
            await worker_sync.announce(instance.id, call.config)
            if caller.awaits_instance:
                caller.signal(Signal.STARTED)
                caller.finish(status)

        task = self._loop.create_task(announce())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    def find(self, instance_id: int, caller: Connection, sequence: bytes) -> None:
        """Look for an unknown instance on disk, and begin the event that waits for it or refuse it."""

        def found(instance: Instance | None) -> None:
            if not caller.awaits_instance:
                return  # the connection was closed or shut down meanwhile
            if instance is None:
                caller.refuse(instance_id)
            else:
                caller.begin(sequence, instance)

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
