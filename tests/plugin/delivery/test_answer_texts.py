"""Odd answers of a metering API: invalid Retry-After dates, redirects, and our own token echoed."""

from __future__ import annotations

import base64
import html
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from openmeter_plugin.delivery.answers import DeliveryError, UndeliveredError
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.harness.sockets import read_post, talking
from tests.plugin.deliveries import delivering, ids, post_once, record, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import destination

TOKEN = "token-that-is-repeated"
NO_DATES = [
    "Sun, 22 Nov 99999999999999 00:00:00 GMT",
    "Sun, 99999999999999999999999 Nov 2026 00:00:00 GMT",
]


def answered(answer: Answer) -> DeliveryError | None:
    with serving(EventsServer(lambda _: answer)) as server:
        return post_once(server.url, token=TOKEN)


@pytest.mark.parametrize("text", NO_DATES)
def test_an_impossible_date_in_retry_after_is_ignored(text: str) -> None:
    error = answered(Answer(429, headers={"retry-after": text}))
    assert isinstance(error, UndeliveredError)
    assert (error.status, error.retry_after) == (429, 0.0)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_packed_answer_which_was_not_asked_for_condemns_no_event(encoding: str) -> None:
    error = answered(Answer(400, "this is not packed at all", headers={"content-encoding": encoding}))
    assert isinstance(error, UndeliveredError)


def test_a_timeout_has_a_message_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = post_once(f"http://127.0.0.1:{silent.getsockname()[1]}/events", timeout=0.5)
    assert isinstance(error, UndeliveredError)
    assert str(error) == "ReadTimeout: the metering API did not answer in time"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_is_reported_without_its_query(status: int) -> None:
    error = answered(
        Answer(status, headers={"location": "https://me:pw@elsewhere.example/events?token=secret"})
    )
    assert isinstance(error, UndeliveredError)
    assert "redirects to https://elsewhere.example/events;" in str(error)
    assert "ingest_endpoint" in str(error)
    assert "secret" not in str(error)
    assert "pw" not in str(error)


def repeating(status: int, times: int | None = None) -> EventsServer:
    """A server that echoes the request's headers, this many times, and then accepts everything."""
    left = [status] * (times or 0)

    def script(post: Post) -> Answer:
        if times is not None and not left:
            return Answer()
        if left:
            left.pop()
        return refusal(status, f"you sent {post.headers['authorization']} and I do not like it")

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
    assert all("you sent Bearer ***" in line for line in failures)
    assert TOKEN not in str(lines)


def test_a_token_echoed_by_an_answer_is_in_no_dead_letter(tmp_path: Path) -> None:
    with serving(repeating(400)) as server:
        write_destination(tmp_path, destination(server.url, token=TOKEN))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            (letter,) = eventually(lambda: read_dead_letters(tmp_path))
    assert "you sent Bearer *** and I do not like it" in str(letter)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "tokens"]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


SECRET = "om+live/abc=DEF&ghi<jkl>"


def in_a_status_line(token: str) -> bytes:
    return f"HTTP/9.9 {token} no\r\n\r\n".encode()


def in_a_header_without_a_name(token: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\n{token}\r\n\r\n".encode()


def in_a_length(token: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-length: {token}\r\n\r\n".encode()


def in_a_location(token: str) -> bytes:
    location = f"http://h/{quote(token, safe='')}"
    return f"HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()


def in_a_body(spell: Callable[[str], str]) -> Callable[[str], bytes]:
    def answer(token: str) -> bytes:
        document = {"type": "about:blank", "title": "Bad Request", "status": 400, "detail": spell(token)}
        body = json.dumps(document).encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n"
        return head + b"content-length: %d\r\n\r\n%s" % (len(body), body)

    return answer


LEAKS: dict[str, Callable[[str], bytes]] = {
    "status line": in_a_status_line,
    "header": in_a_header_without_a_name,
    "length": in_a_length,
    "location": in_a_location,
    "body": in_a_body(str),
    "body, URL": in_a_body(lambda token: quote(token, safe="")),
    "body, HTML": in_a_body(html.escape),
    "body, JSON": in_a_body(json.dumps),
    "body, base64": in_a_body(lambda token: base64.b64encode(f"Bearer {token}".encode()).decode()),
    "body, Python": in_a_body(lambda token: repr({"authorization": f"Bearer {token}"}.items())),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_token_that_comes_back_in_any_way_is_in_no_message(leak: Callable[[str], bytes]) -> None:
    def converse(connection: socket.socket) -> None:
        while read_post(connection):
            connection.sendall(leak(SECRET))

    with talking(converse) as there:
        text = str(post_once(f"{there.url}/events", token=SECRET))
    encoded = base64.b64encode(f"Bearer {SECRET}".encode()).decode()[12:24]
    spellings = (SECRET, quote(SECRET, safe=""), html.escape(SECRET), SECRET[4:12], encoded)
    assert not [spelling for spelling in spellings if spelling in text], text
