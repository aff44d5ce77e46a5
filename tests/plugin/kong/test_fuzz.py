"""Fuzzing: whatever a connection sends, nothing crashes or hangs, and other connections work on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmeter_plugin.kong import codec
from tests.bench.driver import ProtoBuf, connect
from tests.harness.process import PluginServer, plugin_server
from tests.harness.recordings import serialized

pytestmark = pytest.mark.slow

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

instance = st.integers(0, 2**31 - 1)
frames = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda n, body: b"\x08" + codec.encode_varint(n) + body,
        st.integers(0, 2**64 - 1),
        st.binary(max_size=40),
    ),
    st.builds(
        lambda n, body: b"\x08\x01" + codec.encode_bytes(n, body), st.integers(1, 60), st.binary(max_size=40)
    ),
    st.builds(lambda i: b"\x08\x01" + codec.encode_bytes(36, b"\x08" + codec.encode_varint(i)), instance),
    st.builds(
        lambda config: b"\x08\x01" + codec.encode_bytes(33, codec.encode_bytes(2, config)),
        st.binary(max_size=60),
    ),
)
streams = st.builds(
    lambda parts, tail: b"".join(codec.frame(part) for part in parts) + tail,
    st.lists(frames, max_size=5),
    st.binary(max_size=12),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    with plugin_server(tmp_path_factory.mktemp("fuzz")) as running:
        yield running
        assert "connection_failed" not in running.log_text()
        assert "process_ended" not in running.log_text()
        assert "record_unreadable" not in running.log_text()


class Good:
    """A connection of Kong that must never be affected by the others."""

    def __init__(self, server: PluginServer) -> None:
        self.protocol = ProtoBuf()
        self.connection = connect(server.socket)
        self.connection.settimeout(10)
        self.protocol.start(self.connection, {"ingest_endpoint": "http://127.0.0.1:9/", "__plugin_id": "g"})

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def log(self) -> None:
        """Hand a request over; fails if that is not answered."""
        self.connection.sendall(self.protocol.event(1))
        data = b""
        while True:
            received = self.connection.recv(4096)
            assert received, "a good connection was closed"
            data += received
            answer = self.protocol.answer(data, 1)
            if answer == b"":
                return
            if answer:
                data = b""
                self.connection.sendall(answer)


@pytest.fixture(scope="module")
def good(server: PluginServer) -> Iterator[Good]:
    with closing(Good(server)) as kong:
        yield kong


def feed(server: PluginServer, stream: bytes) -> None:
    """Send a stream, end it, and read until the server closes the connection."""
    with connect(server.socket) as connection:
        connection.settimeout(10)
        try:
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass


@FUZZ
@given(stream=streams)
def test_any_stream_ends_its_own_connection_at_most(server: PluginServer, good: Good, stream: bytes) -> None:
    feed(server, stream)
    good.log()


@FUZZ
@given(
    answer=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: codec.encode_bytes(1, b)))
)
def test_any_answer_to_a_pdk_query_is_answered_in_turn(
    server: PluginServer, good: Good, answer: bytes
) -> None:
    with closing(Good(server)) as kong:
        kong.connection.sendall(kong.protocol.event(1))
        asked = 0
        received = b""
        while not received.endswith(codec.encode_return(7)):
            data = kong.connection.recv(4096)
            assert data, "the connection was closed, so Kong would resend the event forever"
            received += data
            queries = received.count(b"kong.")
            if queries > asked:
                asked = queries
                kong.connection.sendall(codec.frame(answer))
    good.log()


@FUZZ
@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000), bit=st.integers(0, 7))
def test_a_torn_or_damaged_event_ends_its_own_connection_at_most(
    server: PluginServer, good: Good, cut: int, flip: int, bit: int
) -> None:
    event = good.protocol.event(1) + codec.frame(codec.encode_bytes(1, serialized("authenticated").log))
    damaged = bytearray(event[: cut % len(event)])
    if damaged:
        damaged[flip % len(damaged)] ^= 1 << bit
    feed(server, bytes(damaged))
    good.log()


def test_many_silent_connections_do_not_delay_others(server: PluginServer, good: Good) -> None:
    silent = [connect(server.socket) for _ in range(300)]
    for connection in silent[::2]:
        connection.sendall(struct.pack("<I", 500) + b"half")
    for _ in range(20):
        good.log()
    for connection in silent:
        connection.close()


def test_a_peer_that_never_reads_its_answers_does_not_delay_others(tmp_path: Path) -> None:
    with plugin_server(tmp_path) as server:
        deaf = connect(server.socket)
        deaf.setblocking(False)
        start = codec.frame(b"\x08\x01" + codec.encode_bytes(33, codec.encode_bytes(2, b"{}")))
        sent = 0
        try:
            while sent < 2000:
                deaf.send(start)
                sent += 1
        except BlockingIOError:
            pass
        with closing(Good(server)) as good:
            good.log()
        deaf.close()
