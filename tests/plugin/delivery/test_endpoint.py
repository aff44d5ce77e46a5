"""Endpoints: pauses, breakers, slow servers."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openmeter_plugin.delivery.answers import RejectedError, UndeliveredError
from openmeter_plugin.delivery.endpoint import Breaker, Breakers, Endpoint
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivered, delivering, event, ids, post_once, record, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import QUEUE, destination

pytestmark = pytest.mark.slow

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


def test_a_pause_is_never_shorter_than_retry_after() -> None:
    assert Breaker().failed(0.01, 0.05, 7) == 7


def test_of_concurrent_failures_the_longest_retry_after_counts() -> None:
    breaker = Breaker()
    assert breaker.failed(0.01, 0.05, 0, failures_at_start=0) < 1
    assert breaker.failed(0.01, 0.05, 70, failures_at_start=0) == 70
    assert breaker.failed(0.01, 0.05, 7, failures_at_start=0) > 60
    assert breaker.failed(0.01, 0.05, 0) < 1
    assert breaker._open_until - time.monotonic() > 60


def test_an_open_breaker_admits_one_probe_and_a_closed_one_admits_all() -> None:
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


def test_queues_with_the_same_dead_endpoint_probe_it_one_at_a_time(tmp_path: Path) -> None:
    now, most, lock = [0], [0], threading.Lock()
    begun: set[str] = set()

    def script(post: Post) -> Answer:
        # The first POST of a queue may start before it knows of a failure, beside another queue's retry.
        queue = post.headers["authorization"]
        with lock:
            if len(begun) < 6 or queue not in begun:
                begun.add(queue)
                return Answer(503)
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
            eventually(lambda: len(server.posts) > 30, what="many retries")
            assert len(begun) == 6
            assert most[0] == 1
            assert {post.headers["authorization"] for post in server.posts[6:]} > {"Bearer token-0"}
            server.script = lambda _: Answer()
            eventually(lambda: len(server.taken) == 6)


def test_a_refused_token_stops_no_other_token_at_the_same_endpoint(tmp_path: Path) -> None:
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


def test_an_endpoint_that_refuses_a_queue_is_up(tmp_path: Path) -> None:
    answers = [Answer(500), Answer(503), Answer(401)]

    async def attempts(url: str) -> list[int]:
        write_destination(tmp_path, destination(url, initial_retry_delay=0.001))
        breakers = Breakers()
        endpoint = Endpoint(DeliveryOptions(tmp_path), QUEUE, breakers)
        failures = []
        for _ in range(3):
            assert not await endpoint.attempt([event(1)])
            failures.append(breakers.of(url).failures)
        await endpoint.close()
        return [*failures, endpoint.failing]

    with serving(EventsServer(lambda _: answers.pop(0))) as server:
        assert asyncio.run(attempts(server.url)) == [1, 2, 0, 1]


def test_an_endpoint_that_refuses_events_is_up(tmp_path: Path) -> None:
    answers = [Answer(500), refusal(400)]

    async def failures(url: str) -> list[int]:
        write_destination(tmp_path, destination(url, initial_retry_delay=0.001))
        breakers = Breakers()
        endpoint = Endpoint(DeliveryOptions(tmp_path), QUEUE, breakers)
        assert not await endpoint.attempt([event(1)])
        before = breakers.of(url).failures
        with pytest.raises(RejectedError):
            await endpoint.attempt([event(1)])
        await endpoint.close()
        return [before, breakers.of(url).failures, endpoint.failing]

    with serving(EventsServer(lambda _: answers.pop(0))) as server:
        assert asyncio.run(failures(server.url)) == [1, 0, 0]


def test_retry_after_delays_only_its_own_queue_unless_the_endpoint_is_down(
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


# Slow servers


@contextmanager
def trickling(answer: bytes, pause: float) -> Iterator[str]:
    """Serve an answer byte by byte, without end."""
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


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 204 No Co", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    ids=["head", "body"],
)
def test_a_post_to_a_server_that_trickles_its_answer_times_out(answer: bytes) -> None:
    with trickling(answer, 0.02) as url:
        started = time.monotonic()
        error = post_once(url, timeout=0.15)
    assert isinstance(error, UndeliveredError)
    assert 0.3 < time.monotonic() - started < 3


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    with serving(EventsServer(lambda _: Answer(500, "x" * 8_000_000))) as server:
        error = post_once(server.url, timeout=10)
    assert isinstance(error, UndeliveredError)
    assert error.status == 500
    assert len(str(error)) < 3000
