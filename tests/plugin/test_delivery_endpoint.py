"""The way to an endpoint: pauses, breakers, tokens from elsewhere, age limits, servers that play for time."""

from __future__ import annotations

import asyncio
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.delivery import pipeline as pipeline_module
from openmeter_plugin.delivery.books import Books
from openmeter_plugin.delivery.breaker import Breaker
from openmeter_plugin.delivery.client import EventsClient, UndeliveredError
from openmeter_plugin.delivery.endpoint import Breakers, Endpoint
from openmeter_plugin.spool.destination import token_file, write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    assert_balanced,
    count,
    delivered,
    delivering,
    event,
    ids,
    record,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, Post, serving
from tests.plugin.spools import QUEUE, destination

# Pauses


def test_pauses_double_up_to_their_bound_with_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    breaker = Breaker()
    pauses = [breaker.failed(0.1, 5, 0) for _ in range(2000)]
    assert pauses[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert max(pauses) == 5
    assert set(asked) == {(0.5, 1.0)}
    breaker.succeeded()
    assert breaker.failed(0.1, 5, 0) == pytest.approx(0.1)


def test_a_pause_is_never_shorter_than_the_server_asked_for() -> None:
    assert Breaker().failed(0.01, 0.05, 7) == 7


def test_of_many_that_wait_at_an_open_breaker_one_tries_and_when_it_is_closed_all_go_on() -> None:
    async def play() -> tuple[int, int]:
        breaker, most, now = Breaker(), [0, 0], [0]
        breaker.failed(0.05, 0.05, 0)
        go_on = asyncio.Event()

        async def one(phase: list[int]) -> None:
            async with breaker.permission():
                now[0] += 1
                most[phase[0]] = max(most[phase[0]], now[0])
                await asyncio.sleep(0.02)
                if not phase[0]:
                    phase[0] = 1
                    breaker.succeeded()
                now[0] -= 1
            go_on.set()

        phase = [0]
        await asyncio.gather(*(one(phase) for _ in range(5)))
        return most[0], most[1]

    alone, together = asyncio.run(play())
    assert (alone, together) == (1, 4)


def test_queues_with_one_dead_endpoint_try_it_one_at_a_time(tmp_path: Path) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def script(post: Post) -> Answer:
        if len(running.posts) <= 6:  # the first of each: nobody has learned of it yet
            return Answer(503)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return Answer(503)

    running = EventsServer(script)
    with serving(running) as server:
        for n in range(6):
            write_destination(tmp_path, destination(server.url, id=f"queue-{n}", token=f"token-{n}"))
            spooled(tmp_path, [record(n)], f"queue-{n}")
        with delivering(tmp_path):
            eventually(lambda: len(server.posts) > 30, what="many tries")
            assert most[0] == 1
            assert {post.headers["authorization"] for post in server.posts[6:]} > {"Bearer token-0"}
            server.script = lambda _: Answer()
            eventually(lambda: len(server.taken) == 6)


def test_a_token_that_is_refused_stops_no_other_token_at_the_same_endpoint(tmp_path: Path) -> None:
    def script(post: Post) -> Answer:
        return Answer(401 if post.headers["authorization"] == "Bearer bad" else 204)

    with serving(EventsServer(script)) as server:
        described = {"max_batch_size": 1, "initial_retry_delay": 30.0, "max_retry_delay": 60.0}
        write_destination(tmp_path, destination(server.url, id="0-bad", token="bad", **described))
        write_destination(tmp_path, destination(server.url, id="1-good", token="good", **described))
        spooled(tmp_path, [record(100)], "0-bad")
        spooled(tmp_path, [record(n) for n in range(20)], "1-good")
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path, "1-good") == 20, seconds=5)
    assert server.taken == ids(range(20))


def test_any_answer_closes_the_breaker_of_an_endpoint_that_was_down(tmp_path: Path) -> None:
    def script(post: Post) -> Answer:
        if len(running.posts) <= 2:
            return Answer(500)
        return Answer(401 if post.headers["authorization"] == "Bearer bad" else 204)

    running = EventsServer(script)
    with serving(running) as server:
        quick = {"initial_retry_delay": 0.05, "max_retry_delay": 0.1}
        write_destination(tmp_path, destination(server.url, id="0-bad", token="bad", **quick))
        write_destination(tmp_path, destination(server.url, id="1-good", token="good", **quick))
        for name in ("0-bad", "1-good"):
            spooled(tmp_path, [record(1)], name)
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path, "1-good") == 1, seconds=5)


def test_an_endpoint_that_answers_is_up_whatever_it_has_against_a_queue(tmp_path: Path) -> None:
    answers = [Answer(500), Answer(503), Answer(401)]

    async def attempts(url: str) -> list[int]:
        write_destination(tmp_path, destination(url, initial_retry_delay=0.001))
        breakers = Breakers()
        endpoint = Endpoint(tmp_path, QUEUE, breakers)
        failures = []
        for _ in range(3):
            assert not await endpoint.attempt([event(1)])
            failures.append(breakers.of(url).failures)
        await endpoint.close()
        return [*failures, endpoint.failing]

    with serving(EventsServer(lambda _: answers.pop(0))) as server:
        assert asyncio.run(attempts(server.url)) == [1, 2, 0, 1]


def test_retry_after_holds_up_only_the_queue_that_was_told_unless_the_endpoint_is_down(
    tmp_path: Path,
) -> None:
    def script(post: Post) -> Answer:
        limited = post.headers["authorization"] == "Bearer limited"
        return Answer(429, headers={"retry-after": "600"}) if limited else Answer()

    with serving(EventsServer(script)) as server:
        for name in ("0-limited", "1-free"):
            write_destination(tmp_path, destination(server.url, id=name, token=name[2:]))
            spooled(tmp_path, [record(n) for n in range(5)], name)
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path, "1-free") == 5, seconds=5)
            spooled(tmp_path, [record(n) for n in range(5, 9)], "1-free")
            eventually(lambda: delivered(tmp_path, "1-free") == 9, seconds=5)
        tokens = [post.headers["authorization"] for post in server.posts]
    assert tokens.count("Bearer limited") == 1


# Servers that play for time


@contextmanager
def trickling(answer: bytes, pause: float) -> Iterator[str]:
    """Serve an answer byte by byte, for ever in the end."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()

    def trickle(connection: socket.socket) -> None:
        with connection:
            try:
                for number in range(1_000_000):
                    connection.sendall(answer[number : number + 1] or b"x")
                    if stop.wait(pause):
                        return
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/events"
    finally:
        stop.set()
        listener.close()


def post_once(url: str, timeout: float) -> BaseException | None:
    async def post() -> None:
        client = EventsClient(destination(url, timeout=timeout))
        try:
            await client.send([event(1)])
        finally:
            await client.close()

    try:
        asyncio.run(post())
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 204 No Co", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    ids=["head", "body"],
)
def test_a_server_that_trickles_its_answer_is_given_up(answer: bytes) -> None:
    with trickling(answer, 0.02) as url:
        started = time.monotonic()
        error = post_once(url, timeout=0.15)
    assert isinstance(error, UndeliveredError)
    assert 0.3 < time.monotonic() - started < 3


def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    with serving(EventsServer(lambda _: Answer(500, "x" * 8_000_000))) as server:
        error = post_once(server.url, timeout=10)
    assert isinstance(error, UndeliveredError)
    assert error.status == 500
    assert len(str(error)) < 3000


# Tokens from elsewhere


def test_a_token_file_takes_the_place_of_every_destinations_token(tmp_path: Path) -> None:
    mine = tmp_path / "token"
    mine.write_text(" from-the-file\n")
    spool = tmp_path / "spool"
    spool.mkdir()
    with serving() as server:
        write_destination(spool, destination(server.url, id="one", token="stored"))
        write_destination(spool, destination(server.url, id="two"))
        for name in ("one", "two"):
            spooled(spool, [record(1)], name)
        run_until_empty(spool, token_file=mine)
        mine.write_text("new")
        spooled(spool, [record(2)], "one")
        run_until_empty(spool, token_file=mine)
    tokens = [post.headers["authorization"] for post in server.posts]
    assert tokens == ["Bearer from-the-file"] * 2 + ["Bearer new"]


def test_the_environments_token_takes_the_place_of_the_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENMETER_PLUGIN_TOKEN", "from-the-environment")
    with serving() as server:
        write_destination(tmp_path, destination(server.url, token="stored"))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
    assert server.posts[0].headers["authorization"] == "Bearer from-the-environment"


def test_where_the_token_comes_from_elsewhere_none_is_kept(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="stored"))
    write_destination(tmp_path, destination(token="stored"), keep_token=False)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and b"stored" in p.read_bytes()] == []
    write_destination(tmp_path, destination(token_unresolved=True), keep_token=False)
    assert not token_file(tmp_path, QUEUE).exists()


def test_a_token_that_the_vault_did_not_give_leaves_the_last_one_in_use(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="good"))
    write_destination(tmp_path, destination(token_unresolved=True))
    assert token_file(tmp_path, QUEUE).read_text() == "good"


def test_a_token_file_that_is_away_holds_deliveries_up_until_it_is_there(tmp_path: Path) -> None:
    mine = tmp_path / "token"
    spool = tmp_path / "spool"
    spool.mkdir()
    with serving() as server:
        write_destination(spool, destination(server.url, token="stored"))
        spooled(spool, [record(1)])
        with structlog.testing.capture_logs() as lines, delivering(spool, token_file=mine):
            eventually(lambda: [line for line in lines if line["event"] == "destination_unreadable"])
            assert server.posts == []
            mine.write_text("there")
            eventually(lambda: server.taken == ids(range(1, 2)))
    assert {post.headers["authorization"] for post in server.posts} == {"Bearer there"}


# Age limits


def stamp(age: timedelta) -> str:
    moment = datetime.now(UTC) - age
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def test_events_older_than_the_age_limit_become_dead_letters_with_the_reason(tmp_path: Path) -> None:
    old, young, future = (stamp(timedelta(minutes=m)) for m in (61, 59, -600))
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0, time=old), record(1, time=young), record(2, time=future)])
        run_until_empty(tmp_path, max_age=timedelta(hours=1))
    assert server.taken == ids(range(1, 3))
    ((_, _, letter),) = read_dead_letters(tmp_path)
    assert (letter.event, letter.status) == (event(0, time=old), None)
    assert "1:00:00" in letter.answer
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (2, 1)
    assert_balanced(tmp_path)


def test_events_that_become_too_old_while_the_endpoint_is_dead_do_not_hold_the_queue_up(
    tmp_path: Path,
) -> None:
    with serving(EventsServer(lambda _: Answer(503))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=2))
        spooled(tmp_path, [record(n, time=stamp(timedelta(0))) for n in range(5)])
        with delivering(tmp_path, max_age=timedelta(seconds=1)):
            eventually(lambda: waiting(tmp_path) == 5 and server.posts)
            eventually(lambda: count(tmp_path, "dead_lettered") == 5, what="the end of their time")
    assert_balanced(tmp_path)


# A clean stop


def test_a_post_under_way_at_a_stop_is_waited_for_and_its_batch_not_sent_again(tmp_path: Path) -> None:
    answering = threading.Event()

    def script(post: Post) -> Answer:
        answering.set()
        time.sleep(0.3)
        return Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        with delivering(tmp_path):
            assert answering.wait(10)
        assert delivered(tmp_path) == 10
        run_until_empty(tmp_path)
    assert set(server.came.values()) == {1}


@pytest.mark.parametrize("way", ["pause", "hang"])
def test_a_stop_does_not_wait_for_a_pause_nor_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(pipeline_module, "_GRACE", 0.2)
    hang = threading.Event()

    def script(post: Post) -> Answer:
        if way == "hang":
            hang.wait(20)
        return Answer(429, headers={"retry-after": "600"})

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url, timeout=30))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            eventually(lambda: server.posts and waiting(tmp_path))
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 2
        hang.set()


def test_a_stop_while_the_books_fail_ends_within_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "_GRACE", 0.2)
    with serving(EventsServer()) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1)])

        def failing(*_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path) == 1)
            monkeypatch.setattr(Books, "deliver", failing)
            spooled(tmp_path, [record(2)])
            eventually(lambda: "event-000002" in server.taken)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 2
