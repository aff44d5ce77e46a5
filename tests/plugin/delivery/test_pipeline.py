"""The pipeline: one or several batches in flight, committed in order whichever completes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.replay import replay_dead_letters
from openmeter_plugin.books.store import Books, Delivery
from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.delivery import endpoint as endpoint_module
from openmeter_plugin.instances.instance import destination_of
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    KEEP_NOTHING,
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    rejects,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, Post, serving
from tests.plugin.spools import destination, segments

pytestmark = pytest.mark.slow


class Gauge:
    """Measures the POSTs in flight, and delays some of them."""

    def __init__(self, hold: Callable[[Post], bool] = lambda _: False) -> None:
        self.now = self.most = 0
        self.go_on = threading.Event()
        self._hold = hold
        self._lock = threading.Lock()

    def __call__(self, post: Post) -> Answer:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        if self._hold(post):
            self.go_on.wait(20)
        else:
            time.sleep(0.005)  # time for concurrent POSTs to arrive
        with self._lock:
            self.now -= 1
        return Answer()


def first(post: Post) -> bool:
    return "event-000000" in post.ids


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_posts_are_in_flight_than_the_destination_allows(tmp_path: Path, concurrency: int) -> None:
    gauge = Gauge()
    with serving(EventsServer(gauge)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5, concurrency=concurrency))
        spooled(tmp_path, [record(n) for n in range(200)])
        run_until_empty(tmp_path)
    assert gauge.most == concurrency
    assert sorted(server.taken) == ids(range(200))
    assert set(server.came.values()) == {1}
    assert delivered(tmp_path) == 200
    assert_balanced(tmp_path)


@pytest.mark.parametrize(("limit", "posts"), [(None, 1), (1, 1), (-1, 4)])
def test_kongs_concurrency_limit_of_minus_one_allows_several_posts_at_once(
    limit: int | None, posts: int
) -> None:
    queue = {} if limit is None else {"concurrency_limit": limit}
    raw: dict[str, Any] = {"ingest_endpoint": "http://127.0.0.1:9/", "queue": queue}
    assert destination_of(raw, parse_config(raw)[0]).concurrency == posts


def test_a_batch_that_completes_early_is_committed_only_after_those_before_it(tmp_path: Path) -> None:
    gauge = Gauge(hold=first)
    with serving(EventsServer(gauge)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5, concurrency=3))
        spooled(tmp_path, [record(n) for n in range(100)])
        with delivering(tmp_path, retention=KEEP_NOTHING):
            # Six more batches may complete before the first; then delivery waits for it.
            eventually(lambda: len(server.taken) == 30, what="the batches that need not wait")
            assert delivered(tmp_path) == 0
            assert len(segments(tmp_path)) == 1
            gauge.go_on.set()
            eventually(lambda: delivered(tmp_path) == 100)
            eventually(lambda: segments(tmp_path) == [], what="the removal")
    assert set(server.came.values()) == {1}


def test_a_completed_batch_is_committed_although_the_next_post_is_not_answered(tmp_path: Path) -> None:
    gauge = Gauge(hold=lambda post: not first(post))
    with serving(EventsServer(gauge)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5, timeout=30))
        spooled(tmp_path, [record(n) for n in range(20)])
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path) == 5, seconds=5, what="the commit of the first")
            gauge.go_on.set()
    assert_balanced(tmp_path)


def test_under_load_several_batches_are_committed_together_and_none_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries: list[Delivery] = []
    deliver = Books.deliver

    def noted(self: Books, queue: str, delivery: Delivery) -> None:
        deliver(self, queue, delivery)
        entries.append(delivery)

    monkeypatch.setattr(Books, "deliver", noted)
    with serving(EventsServer(rejects({"event-000033", "event-000034"}))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5))
        spooled(tmp_path, [record(n) for n in range(200)])
        run_until_empty(tmp_path)
    assert len(entries) <= 20
    assert max(entry.delivered.total() for entry in entries) <= 4 * 5
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (198, 2)
    assert_balanced(tmp_path)


def test_a_stop_waits_for_all_posts_in_flight_and_commits_them(tmp_path: Path) -> None:
    arrived = threading.Semaphore(0)

    def script(post: Post) -> Answer:
        arrived.release()
        time.sleep(0.3 if first(post) else 0.05)
        return Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5, concurrency=2))
        spooled(tmp_path, [record(n) for n in range(10)])
        with delivering(tmp_path):
            assert arrived.acquire(timeout=10)
            assert arrived.acquire(timeout=10)
        assert delivered(tmp_path) == 10
        run_until_empty(tmp_path)
    assert set(server.came.values()) == {1}


def test_of_posts_that_fail_concurrently_only_the_first_extends_the_pause(tmp_path: Path) -> None:
    gate = threading.Barrier(4, timeout=10)

    def script(post: Post) -> Answer:
        if len(server.posts) <= 4:
            gate.wait()
        return Answer(503) if len(server.posts) <= 8 else Answer()

    with serving(EventsServer(script)) as server:
        described = destination(server.url, max_batch_size=1, concurrency=4, max_retry_delay=30)
        write_destination(tmp_path, described)
        spooled(tmp_path, [record(n) for n in range(8)])
        run_until_empty(tmp_path)
    # 10 ms, doubled by each of the four probes, but not by the four concurrent failures before them.
    assert server.posts[-1].at - server.posts[0].at < 1
    assert sorted(server.taken) == ids(range(8))


def test_a_replay_is_sent_while_a_backlog_is_delivered(tmp_path: Path) -> None:
    with serving(EventsServer(rejects({"event-000000"}))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=5, concurrency=3))
        spooled(tmp_path, [record(0)])
        run_until_empty(tmp_path)
        server.script = Gauge()
        spooled(tmp_path, [record(n) for n in range(1, 2000)])
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path) > 50)
            assert replay_dead_letters(tmp_path) == 1
            eventually(lambda: read_dead_letters(tmp_path) == [], what="the replay")
            assert waiting(tmp_path) > 0
    assert set(server.came.values()) == {1}


def test_a_replaced_token_is_used_soon_while_posts_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_REREAD_SECONDS", 0.1)
    with serving() as server:
        write_destination(tmp_path, destination(server.url, token="old"))
        with delivering(tmp_path):
            number = 0

            def token() -> str:
                nonlocal number
                spooled(tmp_path, [record(number)])
                number += 1
                eventually(lambda: len(server.taken) == number)
                return server.posts[-1].headers["authorization"]

            assert token() == "Bearer old"
            write_destination(tmp_path, destination(server.url, token="new"))
            eventually(lambda: token() == "Bearer new", seconds=5)
