"""Connections to the metering API: no answer is taken for another POST's."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from openmeter_plugin.delivery.answers import DeliveryError
from openmeter_plugin.delivery.client import EventsClient
from openmeter_plugin.delivery.options import Network
from tests.harness.sockets import Authority, Conversation, Listening, read_post, reply, talking
from tests.plugin.deliveries import event
from tests.plugin.spools import destination

ACCEPTED = b"HTTP/1.1 204 No Content\r\n\r\n"
FAILED = reply(b"", status=b"500 Internal Server Error")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("authority"))


def posted(there: Listening, number: int = 2, pause: float = 0.0, size: int = 1) -> list[int | None]:
    """Return the outcomes of so many POSTs by one client: None if delivered, else the status."""

    async def post() -> list[int | None]:
        described = destination(f"{there.url}/events", ssl_verify=False, timeout=5.0)
        client = EventsClient(described, Network())
        found: list[int | None] = []
        for n in range(number):
            try:
                await client.post([event(n, pad="x" * size)])
                found.append(None)
            except DeliveryError as error:
                found.append(error.status or 0)
            await asyncio.sleep(pause)
        await client.close()
        return found

    return asyncio.run(post())


def answering(first: Callable[[socket.socket], None]) -> Conversation:
    """Answer the first POST of all by `first`, and every later one with a failure."""
    posts = 0

    def converse(connection: socket.socket) -> None:
        nonlocal posts
        while read_post(connection):
            posts += 1
            if posts == 1:
                first(connection)
            else:
                connection.sendall(FAILED)

    return converse


def together(connection: socket.socket) -> None:
    connection.sendall(ACCEPTED + ACCEPTED)


def one_after_the_other(connection: socket.socket) -> None:
    connection.sendall(ACCEPTED)
    connection.sendall(ACCEPTED)


def a_part(connection: socket.socket) -> None:
    connection.sendall(ACCEPTED + b"HTTP/1.1 204")


@pytest.mark.parametrize("first", [together, one_after_the_other, a_part])
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
def test_an_answer_too_many_delivers_no_other_batch(
    authority: Authority, first: Callable[[socket.socket], None], with_tls: bool
) -> None:
    tls = None
    if with_tls:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(authority.certificate, authority.key)
    with talking(answering(first), tls) as there:
        assert posted(there, pause=0.1) == [None, 500]
        assert there.connections == 2


def test_a_failure_too_many_fails_no_other_batch() -> None:
    posts: list[bytes] = []

    def converse(connection: socket.socket) -> None:
        while body := read_post(connection):
            posts.append(body)
            connection.sendall(ACCEPTED + (FAILED if len(posts) == 1 else b""))

    with talking(converse) as there:
        assert posted(there) == [None, None]
    assert len(posts) == 2


def test_an_answer_before_the_whole_batch_has_arrived_delivers_nothing() -> None:
    def converse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(ACCEPTED)
        while connection.recv(65536):
            pass

    with talking(converse) as there:
        assert posted(there, number=1, size=16 * 1024 * 1024) == [0]


def test_a_refusal_before_the_whole_batch_has_arrived_counts() -> None:
    def converse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(reply(b"too large", status=b"413 Too Large"))
        while connection.recv(65536):
            pass

    with talking(converse) as there:
        assert posted(there, number=1, size=16 * 1024 * 1024) == [413]


def test_a_connection_that_received_its_answers_and_nothing_else_is_used_again() -> None:
    def converse(connection: socket.socket) -> None:
        while read_post(connection):
            connection.sendall(reply(b"{}") if there.connections else ACCEPTED)

    with talking(converse) as there:
        assert posted(there, number=5) == [None] * 5
        assert there.connections == 1


def test_a_private_authority_and_a_client_certificate_are_used(authority: Authority, tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.certificate, authority.key)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(authority.ca)
    names: list[str] = []

    def converse(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        names.append(str(connection.getpeercert()))
        while read_post(connection):
            connection.sendall(ACCEPTED)

    from openmeter_plugin.network.tls import Tls
    from tests.plugin.deliveries import post_once

    mine = Tls(authority.ca, authority.certificate, authority.key)
    with talking(converse, tls) as there:
        assert post_once(f"{there.url}/events") is not None
        assert post_once(f"{there.url}/events", network=Network(Tls(authority.ca))) is not None
        assert names == []
        assert post_once(f"{there.url}/events", network=Network(mine)) is None
        assert "127.0.0.1" in names[0]
