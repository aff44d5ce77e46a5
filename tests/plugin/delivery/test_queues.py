"""Several destinations, their tokens, and how a delivery resumes after a stop."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery import pipeline as pipeline_module
from openmeter_plugin.delivery.pipeline import Pipeline
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, token_file, write_destination
from openmeter_plugin.spool.segment import QUARANTINED, encode_record
from tests.harness.ports import free_port
from tests.harness.process import eventually
from tests.plugin.deliveries import delivered, delivering, fails_first, ids, record, run_until_empty, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, Script, refusal, serving
from tests.plugin.spools import QUEUE, destination, running_writer, segments

pytestmark = pytest.mark.slow

TOKEN = "token-of-the-delivery-tests"


# Several destinations


@pytest.mark.parametrize("way", ["hangs", "refuses", "500"])
def test_one_dead_destination_never_delays_another(tmp_path: Path, way: str) -> None:
    port, hang = free_port(), threading.Event()

    def dead(post: Post) -> Answer:
        if way == "hangs":
            hang.wait(20)
        return Answer(500)

    with serving() as good, serving(EventsServer(dead)) as bad:
        bad_url = f"http://127.0.0.1:{port}/" if way == "refuses" else bad.url
        write_destination(tmp_path, destination(bad_url, id="0-bad", timeout=30))
        write_destination(tmp_path, destination(good.url, id="1-good"))
        spooled(tmp_path, [record(n) for n in range(10)], "0-bad")
        spooled(tmp_path, [record(n) for n in range(100, 200)], "1-good")
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path, "1-good") == 100, seconds=5)
            assert delivered(tmp_path, "0-bad") == 0
            hang.set()
    assert good.taken == ids(range(100, 200))


def test_each_destination_gets_its_own_events_with_its_own_token(tmp_path: Path) -> None:
    with serving() as one, serving() as two:
        write_destination(tmp_path, destination(one.url, id="one", token="first"))
        write_destination(tmp_path, destination(two.url, id="two", token="second"))
        spooled(tmp_path, [record(n) for n in range(5)], "one")
        spooled(tmp_path, [record(n) for n in range(5, 9)], "two")
        run_until_empty(tmp_path)
    assert (one.taken, two.taken) == (ids(range(5)), ids(range(5, 9)))
    assert {post.headers["authorization"] for post in one.posts} == {"Bearer first"}
    assert {post.headers["authorization"] for post in two.posts} == {"Bearer second"}


def test_a_queue_that_appears_later_is_delivered_too(tmp_path: Path, server: EventsServer) -> None:
    with delivering(tmp_path):
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(5)])
        eventually(lambda: delivered(tmp_path) == 5)


def test_a_queue_that_fails_with_an_internal_error_is_restarted_and_the_others_continue(
    tmp_path: Path, server: EventsServer, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, faults = Pipeline.work, [RuntimeError("an internal error")] * 2

    async def failing(pipeline: Pipeline, *, coalesce: bool) -> bool:
        if pipeline._queue == "0-faulty" and faults:
            raise faults.pop()
        return await work(pipeline, coalesce=coalesce)

    monkeypatch.setattr(Pipeline, "work", failing)
    for queue in ("0-faulty", "1-good"):
        write_destination(tmp_path, destination(server.url, id=queue))
    spooled(tmp_path, [record(n) for n in range(5)], "0-faulty")
    spooled(tmp_path, [record(n) for n in range(5, 10)], "1-good")
    with delivering(tmp_path):
        eventually(lambda: delivered(tmp_path, "1-good") == 5)
        eventually(lambda: delivered(tmp_path, "0-faulty") == 5, what="a new start")
    assert faults == []
    assert set(server.came.values()) == {1}
    assert [line for line in lines if line["event"] == "queue_delivery_failed"]


def test_quarantined_requests_are_never_sent(tmp_path: Path, server: EventsServer) -> None:
    spooled(tmp_path, [encode_record(QUARANTINED + b"{}"), record(1)], QUARANTINE)
    write_destination(tmp_path, destination(server.url, id=QUARANTINE))
    run_until_empty(tmp_path)
    assert server.posts == []
    assert len(segments(tmp_path, QUARANTINE)) == 1


def test_a_queue_without_a_description_waits_for_one(
    tmp_path: Path, server: EventsServer, lines: list[Any]
) -> None:
    spooled(tmp_path, [record(n) for n in range(5)])
    with delivering(tmp_path):
        eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
        write_destination(tmp_path, destination(server.url))
        eventually(lambda: delivered(tmp_path) == 5)
    assert server.taken == ids(range(5))


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00" * 100], ids=repr)
def test_a_damaged_description_delays_the_queue_only_until_it_is_written_again(
    tmp_path: Path, server: EventsServer, lines: list[Any], content: str
) -> None:
    write_destination(tmp_path, destination(server.url))
    (queues_directory(tmp_path) / QUEUE / "destination.json").write_text(content)
    spooled(tmp_path, [record(n) for n in range(5)])
    with delivering(tmp_path):
        eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
        write_destination(tmp_path, destination(server.url))
        eventually(lambda: delivered(tmp_path) == 5)
    assert server.taken == ids(range(5))


# Tokens


def wants(token: str) -> Script:
    def script(post: Post) -> Answer:
        return Answer() if post.headers.get("authorization") == f"Bearer {token}" else Answer(401, "who?")

    return script


def test_a_new_token_in_the_token_file_reaches_a_waiting_backlog(tmp_path: Path, lines: list[Any]) -> None:
    with serving(EventsServer(wants("new-token"))) as server:
        write_destination(tmp_path, destination(server.url, token="old-token"))
        spooled(tmp_path, [record(n) for n in range(20)])
        with delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "token_refused"])
            assert delivered(tmp_path) == 0
            token_file(tmp_path, QUEUE).write_text("new-token\n")
            eventually(lambda: delivered(tmp_path) == 20)
    assert server.taken == ids(range(20))
    alarm = next(line for line in lines if line["event"] == "token_refused")
    assert alarm["log_level"] == "critical"
    assert "-token" not in repr(lines)


@pytest.mark.parametrize("token", ["secret\nsecret", "secr\N{DEGREE SIGN}t", "secret\x00"])
def test_a_token_that_no_header_can_carry_delays_the_queue_and_is_in_no_log_line(
    tmp_path: Path, lines: list[Any], token: str
) -> None:
    with serving(EventsServer(wants("good"))) as server:
        write_destination(tmp_path, destination(server.url, token=token))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
            token_file(tmp_path, QUEUE).write_text("good")
            eventually(lambda: delivered(tmp_path) == 1)
    assert "secr" not in repr(lines)


def test_no_log_line_contains_a_token_whatever_goes_wrong(tmp_path: Path, lines: list[Any]) -> None:
    troubles = [Answer(500), Answer(401), Answer(cut=True), refusal()]
    with serving(EventsServer(fails_first(4, *troubles))) as server:
        write_destination(tmp_path, destination(server.url, token=TOKEN))
        spooled(tmp_path, [record(n) for n in range(5)])
        run_until_empty(tmp_path)
    assert lines
    assert TOKEN not in repr(lines)


# Restarts


def test_nothing_is_sent_twice_after_a_clean_stop(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=7))
    with running_writer(tmp_path) as writer:
        queue = writer.queue(QUEUE)
        for start in range(0, 60, 20):
            for n in range(start, start + 20):
                writer.append(queue, record(n), None)
            with delivering(tmp_path):
                eventually(lambda end=start + 20: delivered(tmp_path) == end)  # type: ignore[misc]
    assert server.taken == ids(range(60))
    assert set(server.came.values()) == {1}


def test_what_was_in_flight_at_a_stop_is_sent_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "_STOP_GRACE", 0.1)
    hang = threading.Event()

    def script(post: Post) -> Answer:
        hang.wait(20)
        return Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url, timeout=30))
        spooled(tmp_path, [record(n) for n in range(10)])
        with delivering(tmp_path):
            eventually(lambda: server.posts)
        assert delivered(tmp_path) == 0
        hang.set()
        run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(10))
    assert delivered(tmp_path) == 10


@pytest.mark.parametrize("damage", ["garbage", "page", "gone"])
def test_with_damaged_books_it_sends_and_counts_all_retained_events_again(
    tmp_path: Path, server: EventsServer, damage: str
) -> None:
    write_destination(tmp_path, destination(server.url))
    with running_writer(tmp_path) as writer:
        for n in range(10):
            writer.append(writer.queue(QUEUE), record(n), None)
        with delivering(tmp_path):
            eventually(lambda: delivered(tmp_path) == 10)
        file = tmp_path / FILE
        if damage == "gone":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[:4096] + b"\xa5" * 8192 if damage == "page" else b"garbage" * 1000)
        writer.append(writer.queue(QUEUE), record(10), None)
        with delivering(tmp_path):
            eventually(lambda: len(server.taken) == 11)
    assert server.taken == ids(range(11))
    assert len(list(tmp_path.glob(f"{FILE}.damaged-*[0-9]"))) == (damage != "gone")


def test_a_batch_is_not_sent_again_if_only_the_books_cannot_be_written(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "_BOOKS_RETRY_SECONDS", 0.01)
    deliver_entry, failures = Books.deliver, [1, 2, 3]

    def failing(self: Books, *arguments: Any) -> None:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("database or disk is full")
        deliver_entry(self, *arguments)

    monkeypatch.setattr(Books, "deliver", failing)
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(10)])
    run_until_empty(tmp_path)
    assert failures == []
    assert len(server.posts) == 1
    assert delivered(tmp_path) == 10


def test_of_two_deliveries_of_one_spool_one_sends_and_the_other_waits(tmp_path: Path) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        with running_writer(tmp_path) as writer, delivering(tmp_path):
            queue = writer.queue(QUEUE)
            writer.append(queue, record(0), None)
            eventually(lambda: delivered(tmp_path) == 1)
            with pytest.raises(TimeoutError):
                run_until_empty(tmp_path, seconds=0.5)
            for n in range(1, 50):
                writer.append(queue, record(n), None)
            eventually(lambda: delivered(tmp_path) == 50)
            writer.append(queue, record(50), None)
            eventually(lambda: delivered(tmp_path) == 51)
        spooled(tmp_path, [record(51)])
        run_until_empty(tmp_path)
    assert server.taken == ids(range(52))
    assert set(server.came.values()) == {1}
