"""Odd answers of a metering API: invalid Retry-After dates, redirects, and our own token echoed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.delivery.client import EventsClient, RejectedError, UndeliveredError
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, event, ids, record, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, serving
from tests.plugin.spools import destination

TOKEN = "token-that-is-repeated"
NO_DATES = [
    "Sun, 22 Nov 99999999999999 00:00:00 GMT",
    "Sun, 99999999999999999999999 Nov 2026 00:00:00 GMT",
]


def send_to(server: EventsServer) -> None:
    async def send(url: str) -> None:
        client = EventsClient(destination(url))
        try:
            await client.send([event(1)])
        finally:
            await client.close()

    with serving(server):
        asyncio.run(send(server.url))


@pytest.mark.parametrize("text", NO_DATES)
def test_an_impossible_date_in_retry_after_is_ignored(text: str) -> None:
    with pytest.raises(UndeliveredError) as caught:
        send_to(EventsServer(lambda _: Answer(429, headers={"retry-after": text})))
    assert (caught.value.status, caught.value.retry_after) == (429, 0.0)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_cannot_be_decompressed_is_classified_by_its_status(encoding: str) -> None:
    headers = {"content-encoding": encoding}
    with pytest.raises(RejectedError) as caught:
        send_to(EventsServer(lambda _: Answer(400, "this is not packed at all", headers=headers)))
    assert caught.value.status == 400


def test_a_timeout_has_a_message_in_words() -> None:
    async def send(address: str) -> None:
        client = EventsClient(destination(f"http://{address}/events", timeout=0.05))
        try:
            await client.send([event(1)])
        finally:
            await client.close()

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UndeliveredError, match=r"^ReadTimeout: the metering API did not answer in time$"),
    ):
        asyncio.run(send(f"127.0.0.1:{silent.getsockname()[1]}"))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_is_reported_without_its_query(status: int) -> None:
    location = {"location": "https://elsewhere.example/events?token=secret"}
    with pytest.raises(UndeliveredError, match=r"redirects to https://elsewhere.example/events;") as caught:
        send_to(EventsServer(lambda _: Answer(status, headers=location)))
    assert "ingest_endpoint" in str(caught.value)
    assert "secret" not in str(caught.value)


def repeating(status: int, times: int | None = None) -> EventsServer:
    """A server that echoes the request's headers, this many times, and then accepts everything."""
    left = [status] * (times or 0)

    def script(post: Post) -> Answer:
        if times is not None and not left:
            return Answer()
        if left:
            left.pop()
        return Answer(status, f"you sent {post.headers['authorization']} and I do not like it")

    return EventsServer(script)


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_token_echoed_by_an_answer_is_not_logged(tmp_path: Path, status: int, lines: list[Any]) -> None:
    with serving(repeating(status, times=2)) as server:
        write_destination(tmp_path, destination(server.url, token=TOKEN))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            eventually(lambda: server.taken == ids(range(1, 2)))
    failures = [str(line) for line in lines if line["event"] in ("delivery_failed", "token_refused")]
    assert failures
    assert all("you sent Bearer [the token]" in line for line in failures)
    assert TOKEN not in str(lines)


def test_a_token_echoed_by_an_answer_is_in_no_dead_letter(tmp_path: Path) -> None:
    with serving(repeating(400)) as server:
        write_destination(tmp_path, destination(server.url, token=TOKEN))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            (letter,) = eventually(lambda: read_dead_letters(tmp_path))
    assert "you sent Bearer [the token] and I do not like it" in str(letter)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "tokens"]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
