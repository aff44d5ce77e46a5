"""Driving a plugin server as fast as one Python process can, over either protocol.

Frames are made beforehand and answers are looked at no more than needed, so that the driver costs far
less than what it measures. One epoll loop, a connection per event under way, as Kong's pool has them.
"""

from __future__ import annotations

import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import orjson

from openmeter_plugin.kong import codec
from tests.harness.recordings import serialized


@dataclass(frozen=True)
class Run:
    """What a run came to: `seconds` of wall-clock time for so many events."""

    events: int
    seconds: float

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


class Protocol(ABC):
    """Kong's side of a protocol, in prepared bytes."""

    def __init__(self) -> None:
        recorded = serialized("authenticated")
        self._id = recorded.parsed["request"]["id"].encode()
        before, _, after = recorded.log.partition(self._id)
        middle, _, rest = after.partition(self._id)
        # The id is in the log twice, in a response header and as the request's own.
        self._parts = (before, middle, rest)
        self.log_size = len(recorded.log)

    def log(self, number: int) -> bytes:
        """Return the serialized log of a request with an id of its own."""
        request_id = b"%032x" % number
        return request_id.join(self._parts)

    @abstractmethod
    def start(self, connection: socket.socket, config: dict[str, Any]) -> None:
        """Start the instance that events are for."""

    @abstractmethod
    def event(self, number: int) -> bytes:
        """Return the bytes that begin an event."""

    @abstractmethod
    def answer(self, data: bytes, number: int) -> bytes | None:
        """Return Kong's answer to the question in `data`; None while it is incomplete, b"" at the end."""


class ProtoBuf(Protocol):
    """ProtoBuf:1, as `openmeter-plugin serve` speaks it."""

    def start(self, connection: socket.socket, config: dict[str, Any]) -> None:
        """Start the instance."""
        body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, orjson.dumps(config))
        connection.sendall(codec.frame(b"\x08\x01" + codec.encode_bytes(33, body)))
        answer = connection.recv(65536)
        status = dict(codec._fields(dict(codec._fields(answer[4:]))[33]))  # type: ignore[arg-type]
        instance = codec.encode_varint(int(status[2]))
        self._event = codec.frame(
            b"\x08\x07" + codec.encode_bytes(36, codec.encode_bytes(2, b"log") + b"\x08" + instance)
        )
        self._end = codec.END_OF_EVENT + codec.encode_return(7)

    def event(self, number: int) -> bytes:
        """Return the HandleEvent frame."""
        return self._event

    def answer(self, data: bytes, number: int) -> bytes | None:
        """Answer kong.log.serialize, the only question for a consumer's request."""
        if data == codec.QUERY_LOG:
            return codec.frame(codec.encode_bytes(1, self.log(number)))
        if data == self._end:
            return b""
        assert codec.QUERY_LOG.startswith(data) or self._end.startswith(data), data
        return None


class MsgPack(Protocol):
    """MsgPack:1, as stock kong-pdk speaks it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def start(self, connection: socket.socket, config: dict[str, Any]) -> None:
        """Start the instance."""
        argument = {"Name": self._name, "Config": orjson.dumps(config).decode()}
        connection.sendall(msgpack.packb([0, 1, "plugin.StartInstance", [argument]]))
        answer = msgpack.unpackb(connection.recv(65536))
        handle = {"InstanceId": answer[3]["Id"], "EventName": "log"}
        self._event = msgpack.packb([0, 7, "plugin.HandleEvent", [handle]])

    def event(self, number: int) -> bytes:
        """Return the HandleEvent call."""
        return bytes(self._event)

    def answer(self, data: bytes, number: int) -> bytes | None:
        """Answer a step, whose event id the server chose."""
        try:
            result = msgpack.unpackb(data)[3]
        except ValueError:
            return None
        if result["Data"] == "ret":
            return b""
        step = {"EventId": result["EventId"], "Data": self.log(number)}
        return bytes(msgpack.packb([0, 8, "plugin.Step", [step]], use_bin_type=False))


def connect(path: Path) -> socket.socket:
    """Return a connection to the server."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(path))
    return connection


def drive(
    path: Path,
    protocol: Protocol,
    config: dict[str, Any],
    *,
    events: int,
    concurrency: int,
    first: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> Run:
    """Hand over so many events, numbered from `first`, and return when each is acknowledged."""
    with connect(path) as connection:
        protocol.start(connection, config)
    poll = select.epoll()
    lanes: dict[int, tuple[socket.socket, list[Any]]] = {}
    started = time.perf_counter()
    next_event, end = first, first + events
    for _ in range(min(concurrency, events)):
        connection = connect(path)
        lanes[connection.fileno()] = (connection, [next_event, b""])
        poll.register(connection, select.EPOLLIN)
        connection.sendall(protocol.event(next_event))
        next_event += 1
    done = 0
    while done < events:
        for descriptor, _ in poll.poll(30):
            connection, state = lanes[descriptor]
            data = connection.recv(65536)
            assert data, "the server closed a connection"
            if state[1]:
                data = state[1] + data
            answer = protocol.answer(data, state[0])
            if answer is None:
                state[1] = data
                continue
            state[1] = b""
            if answer:
                connection.sendall(answer)
                continue
            done += 1
            if done % 10_000 == 0:
                tick(done)
            if next_event < end:
                state[0] = next_event
                next_event += 1
                connection.sendall(protocol.event(state[0]))
    seconds = time.perf_counter() - started
    for connection, _ in lanes.values():
        connection.close()
    poll.close()
    return Run(events, seconds)
