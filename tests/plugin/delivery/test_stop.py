"""The end of sending: age limits and stops."""

from __future__ import annotations

import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery import pipeline as pipeline_module
from openmeter_plugin.spool.destination import write_destination
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
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving, take_all
from tests.plugin.spools import destination

pytestmark = pytest.mark.slow

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


def test_events_that_grow_too_old_while_the_endpoint_is_down_do_not_block_the_queue(
    tmp_path: Path,
) -> None:
    with serving(EventsServer(lambda _: Answer(503))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=2))
        spooled(tmp_path, [record(n, time=stamp(timedelta(0))) for n in range(5)])
        with delivering(tmp_path, max_age=timedelta(seconds=1)):
            eventually(lambda: waiting(tmp_path) == 5 and server.posts)
            eventually(lambda: count(tmp_path, "dead_lettered") == 5, what="their expiry")
    assert_balanced(tmp_path)


def test_events_that_grow_too_old_during_the_search_for_a_bad_one_do_not_block_the_queue(
    tmp_path: Path,
) -> None:
    def script(post: Post) -> Answer:
        return refusal() if len(post.ids) > 1 else Answer(503)

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n, time=stamp(timedelta(0))) for n in range(4)])
        with delivering(tmp_path, max_age=timedelta(seconds=2)):
            eventually(lambda: [post for post in server.posts if len(post.ids) == 1], what="the search")
            eventually(lambda: count(tmp_path, "dead_lettered") == 4, what="their expiry")
    assert_balanced(tmp_path)


# A clean stop


def test_a_stop_waits_for_the_post_in_flight_so_that_its_batch_is_not_sent_again(tmp_path: Path) -> None:
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
def test_a_stop_waits_neither_for_a_pause_nor_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "hang":
        monkeypatch.setattr(pipeline_module, "_STOP_GRACE", 0.2)
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


def test_a_post_that_fails_during_a_stop_is_retried_by_the_next_start(tmp_path: Path) -> None:
    arrived, fail = threading.Event(), threading.Event()

    def script(post: Post) -> Answer:
        arrived.set()
        fail.wait(20)
        return Answer(503)

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        with delivering(tmp_path):
            assert arrived.wait(10)
            failing = threading.Timer(0.2, fail.set)  # once the stop has begun
            failing.start()
        failing.join()
        assert len(server.posts) == 1
        server.script = take_all
        run_until_empty(tmp_path)
    assert server.taken == ids(range(10))


def test_a_stop_while_the_books_fail_ends_within_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "_STOP_GRACE", 0.2)
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
