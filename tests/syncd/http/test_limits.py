"""Answers without an end, in bytes, time or pages; bytes after an answer; requests to stop."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable

import pytest

from syncd.core.errors import ApiError, MalformedError, SourceError, StoppedError, UnreachableError
from syncd.http import connection
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.pagination import Page, read_all
from syncd.http.retry import Retry
from syncd.sources.base import offset_pages
from tests.harness.sockets import read_request, reply, talking
from tests.syncd.servers import Answer, Asked, serving

MIB = 1024 * 1024


def client(
    url: str,
    timeout: float = 5,
    should_stop: Callable[[], bool] = lambda: False,
) -> ApiClient:
    endpoint = Endpoint(
        "metering",
        url,
        "metering.token",
        "do it",
        token="s3cr3t",
        timeout=timeout,
        max_answer_bytes=4 * MIB,
    )
    return ApiClient(endpoint, Retry(attempts=1, should_stop=should_stop))


def test_a_body_without_an_end_is_not_read_to_its_end() -> None:
    sent = 0

    def endless(talk: socket.socket) -> None:
        nonlocal sent
        read_request(talk)
        talk.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            talk.sendall(b"x" * MIB)
            sent += MIB

    with (
        talking(endless) as there,
        client(there.url) as api,
        pytest.raises(MalformedError, match="GET /x with more than 4 MiB"),
    ):
        api.get("/x")
    assert sent < 40 * MIB


def test_a_small_body_that_unpacks_to_a_huge_one_is_refused_while_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = 0
    step = connection._gunzipped

    def watched(chunks: object) -> object:
        nonlocal largest
        for part in step(chunks):  # type: ignore[arg-type]
            largest = max(largest, len(part))
            yield part

    monkeypatch.setattr(connection, "_gunzipped", watched)
    bomb = gzip.compress(b"\0" * (200 * MIB))
    answer = Answer(bomb, headers={"Content-Encoding": "gzip"})
    with (
        serving(lambda _: answer) as server,
        client(server.url) as api,
        pytest.raises(MalformedError, match="more than 4 MiB"),
    ):
        api.get("/x")
    assert 0 < largest <= 64 * 1024


def test_a_packed_answer_is_read() -> None:
    packed = Answer(gzip.compress(b'{"a": 1}'), headers={"Content-Encoding": "gzip"})
    with serving(lambda _: packed) as server, client(server.url) as api:
        assert api.get("/x") == {"a": 1}


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (b"not gzip", "gzip", "cannot be unpacked"),
        (gzip.compress(b"{}" * 1000)[:-12], "gzip", "cut off"),
        (gzip.compress(gzip.compress(b"{}")), "gzip, gzip", "not asked for"),
        (b"{}", "br", "not asked for"),
    ],
    ids=["no gzip", "cut off", "twice", "another"],
)
def test_a_body_that_cannot_be_unpacked_is_an_error_in_words(body: bytes, encoding: str, words: str) -> None:
    answer = Answer(body, headers={"Content-Encoding": encoding})
    with (
        serving(lambda _: answer) as server,
        client(server.url) as api,
        pytest.raises(MalformedError, match=words),
    ):
        api.get("/x")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
def test_an_answer_of_one_byte_at_a_time_ends_with_the_time_for_the_whole(start: bytes) -> None:
    def trickle(talk: socket.socket) -> None:
        read_request(talk)
        talk.sendall(start)
        while True:
            talk.sendall(b"H")
            time.sleep(0.05)

    began = time.monotonic()
    with (
        talking(trickle) as there,
        client(there.url, timeout=0.3) as api,
        pytest.raises(UnreachableError, match=r"metering\.timeout: 0\.3 s for each step, 0\.9 s in all"),
    ):
        api.get("/x")
    assert 0.8 < time.monotonic() - began < 3


def silence(talk: socket.socket) -> None:
    read_request(talk)
    talk.recv(1)


def trickling(talk: socket.socket) -> None:
    read_request(talk)
    talk.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        talk.sendall(b" ")
        time.sleep(0.05)


def no_handshake(talk: socket.socket) -> None:
    while talk.recv(65536):
        pass


@pytest.mark.parametrize(
    ("converse", "scheme"),
    [(silence, "http"), (trickling, "http"), (no_handshake, "https")],
    ids=["silence", "trickle", "handshake"],
)
def test_a_request_to_stop_ends_a_request_that_waits(
    converse: Callable[[socket.socket], None], scheme: str
) -> None:
    stopping = threading.Event()
    threading.Timer(0.3, stopping.set).start()
    began = time.monotonic()
    with talking(converse) as there:
        there.scheme = scheme
        with (
            client(there.url, timeout=30, should_stop=stopping.is_set) as api,
            pytest.raises(StoppedError, match=r"stopped by request while metering API .* GET /x"),
        ):
            api.get("/x")
    assert time.monotonic() - began < 2


def test_a_request_to_stop_ends_the_waits_between_tries_and_nothing_is_sent_after_it() -> None:
    stopping = threading.Event()

    def limited(_asked: Asked) -> Answer:
        stopping.set()
        return Answer({}, 429, {"Retry-After": "60"})

    with serving(limited) as server:
        endpoint = Endpoint("metering", server.url, "metering.token", "do it")
        retry = Retry(attempts=5, sleep=stopping.wait, should_stop=stopping.is_set)
        with ApiClient(endpoint, retry) as api, pytest.raises(StoppedError):
            api.get("/x")
        assert len(server.asked) == 1


def test_a_second_answer_in_the_same_packet_is_never_taken_for_the_next_requests() -> None:
    def twice(talk: socket.socket) -> None:
        while head := read_request(talk):
            path = head.split()[1]
            talk.sendall(reply(b'"%s"' % path) + reply(b'"stray"'))

    with talking(twice) as there, client(there.url) as api:
        assert [api.get(f"/{number}") for number in range(3)] == ["/0", "/1", "/2"]
        assert there.connections == 3


@pytest.mark.parametrize("stray", [reply(b'"stray"'), b"x", reply(b'"stray"')[:20]])
def test_bytes_that_arrive_after_an_answer_are_never_taken_for_the_next_requests(stray: bytes) -> None:
    sent = threading.Event()

    def late(talk: socket.socket) -> None:
        while head := read_request(talk):
            talk.sendall(reply(b'"%s"' % head.split()[1]))
            time.sleep(0.05)
            talk.sendall(stray)
            sent.set()

    with talking(late) as there, client(there.url) as api:
        for number in range(3):
            sent.clear()
            assert api.get(f"/{number}") == f"/{number}"
            assert sent.wait(5)
            time.sleep(0.02)
        assert there.connections == 3


def test_a_connection_without_unread_bytes_is_used_again() -> None:
    def orderly(talk: socket.socket) -> None:
        while read_request(talk):
            talk.sendall(reply())

    with talking(orderly) as there, client(there.url) as api:
        for _ in range(5):
            api.get("/x")
        assert there.connections == 1


def offsets(page: Callable[[int], list[dict[str, object]]]) -> Callable[[Asked], Answer]:
    """Answer with pages that always name a next one."""

    def answer(asked: Asked) -> Answer:
        number = int(asked.query.get("offset", 0))
        return Answer({"data": page(number), "offset": str(number + 1)})

    return answer


@pytest.mark.parametrize(
    "page", [lambda _: [], lambda number: [{"id": str(number % 3)}]], ids=["empty", "seen before"]
)
def test_a_page_that_brings_nobody_new_ends_a_list_that_names_ever_new_pages(
    page: Callable[[int], list[dict[str, object]]],
) -> None:
    with serving(offsets(page)) as server, client(server.url) as api:
        with pytest.raises(SourceError, match="kong: /consumers: a page brought nothing new"):
            list(offset_pages(api, "/consumers", {}, "kong"))
        assert len(server.asked) <= 4


def test_a_list_of_ever_new_consumers_ends_at_a_limit() -> None:
    with serving(offsets(lambda number: [{"id": str(number)}])) as server, client(server.url) as api:
        with pytest.raises(SourceError, match="more than 5 pages"):
            list(offset_pages(api, "/consumers", {}, "kong", max_pages=5))
        assert len(server.asked) == 5


def test_an_empty_last_page_is_the_end_and_no_error() -> None:
    pages = [Answer({"data": [{"id": "1"}], "offset": "2"}), Answer({"data": [], "offset": None})]
    with serving(lambda asked: pages["offset" in asked.query]) as server, client(server.url) as api:
        assert list(offset_pages(api, "/consumers", {}, "kong")) == [{"id": "1"}]


def test_a_numbered_list_of_ever_new_entries_ends_at_a_limit() -> None:
    asked: list[int] = []

    def fetch(number: int, _size: int) -> Page:
        asked.append(number)
        return Page([{"id": str(len(asked))}], 10**12)

    with pytest.raises(MalformedError, match="customers: more than 5 pages"):
        read_all(fetch, "customers", created="createdAt", max_pages=5)
    assert len(asked) == 7


def test_a_thousand_header_lines_or_an_endless_one_are_an_error() -> None:
    def endless(talk: socket.socket) -> None:
        read_request(talk)
        talk.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            talk.sendall(b"x" * 65536)

    with talking(endless) as there, client(there.url) as api, pytest.raises(ApiError, match="not HTTP"):
        api.get("/x")
