"""Accounting: the books are balanced at every moment, and a resent request is billed once."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from openmeter_plugin.books import accountant as accountant_module
from openmeter_plugin.books.accountant import Accountant
from openmeter_plugin.books.ledger_lines import ledger_key
from openmeter_plugin.books.store import Books, Delivery
from openmeter_plugin.delivery.pipeline import Batch, BatchReader
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, write_destination
from openmeter_plugin.spool.queue import Segment
from openmeter_plugin.spool.reader import QueueReader
from openmeter_plugin.spool.segment import EVENTS, LOST, QUARANTINED, encode_events, encode_record
from tests.harness.books import read_counts, read_ledger
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
    skip,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, refusal, serving, take_all
from tests.plugin.spools import QUEUE, destination, reading, running_writer

pytestmark = pytest.mark.slow


@contextmanager
def accounting(spool: Path, queue: str = QUEUE) -> Iterator[Accountant]:
    with closing(Books(spool)) as books, reading(spool, queue, books.positions(queue)) as reader:
        yield Accountant(spool, queue, books, reader)


def quarantined(request_id: str | None, reason: str = "no_consumer") -> bytes:
    log = {"request": {"id": request_id}} if request_id else {}
    return encode_record(QUARANTINED + orjson.dumps({"reason": reason, "log": log}))


# During an outage


def test_skips_and_backlog_are_in_the_books_while_the_endpoint_is_down(tmp_path: Path) -> None:
    with serving(EventsServer(lambda _: Answer(500))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=10))
        with running_writer(tmp_path) as writer, delivering(tmp_path):
            queue = writer.queue(QUEUE)
            for n in range(100):
                writer.append(queue, record(n), None)
            eventually(lambda: len(server.posts) > 2, what="the outage")
            writer.append_all([(queue, skip(), None, None) for _ in range(20)])
            for n in range(100, 150):
                writer.append(queue, record(n), None)
            eventually(lambda: waiting(tmp_path) == 150, what="the backlog")
            eventually(lambda: count(tmp_path, "skipped", "no_consumer") == 20, what="the skips")
            assert delivered(tmp_path) == 0
    assert_balanced(tmp_path)
    assert sum(line.accepted for line in read_ledger(tmp_path)) == 150


def test_the_ledger_counts_by_destination_hour_of_event_time_type_and_subject(tmp_path: Path) -> None:
    bad = {"event-000007"}
    with serving(EventsServer(lambda post: refusal() if set(post.ids) & bad else Answer())) as server:
        for queue in ("one", "two"):
            write_destination(tmp_path, destination(server.url, id=queue))
        spooled(tmp_path, [record(n, subject="alice") for n in range(5)], "one")
        spooled(tmp_path, [record(5, 6, 7, subject="bob", time="2026-11-22T23:59:59.999Z")], "one")
        spooled(tmp_path, [record(8, subject="alice")], "two")
        run_until_empty(tmp_path)
    lines = [
        (line.queue, line.hour, line.subject, line.accepted, line.delivered, line.dead_lettered)
        for line in read_ledger(tmp_path)
    ]
    assert lines == [
        ("one", "2026-11-22T05", "alice", 5, 5, 0),
        ("two", "2026-11-22T05", "alice", 1, 1, 0),
        ("one", "2026-11-22T23", "bob", 3, 2, 1),
    ]
    assert {line.type for line in read_ledger(tmp_path)} == {"kong.api_request"}


def test_an_event_without_a_summary_is_counted_by_its_own_members(tmp_path: Path) -> None:
    with serving(EventsServer(lambda post: refusal() if "event-000001" in post.ids else Answer())) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [encode_events([event(n), event(n + 10)]) for n in range(3)])
        run_until_empty(tmp_path)
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (5, 1)
    assert_balanced(tmp_path)


# Resent requests


def test_a_resent_request_is_counted_as_resent_and_sent_once(tmp_path: Path) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0), record(1, 2), record(0), skip(), record(1, 2), record(3)])
        run_until_empty(tmp_path)
    assert server.taken == ids(range(4))
    assert set(server.came.values()) == {1}
    assert (count(tmp_path, "metered"), count(tmp_path, "resent"), delivered(tmp_path)) == (3, 2, 4)
    assert_balanced(tmp_path)


@pytest.mark.parametrize("restarted", [False, True], ids=["in one run", "across a restart"])
def test_a_request_resent_to_another_worker_is_sent_once(tmp_path: Path, restarted: bool) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        if restarted:
            run_until_empty(tmp_path)
        spooled(tmp_path, [record(9), record(10)])
        run_until_empty(tmp_path)
        run_until_empty(tmp_path)
    assert server.taken == ids(range(11))
    assert set(server.came.values()) == {1}
    assert (count(tmp_path, "resent"), waiting(tmp_path)) == (1, 0)
    assert_balanced(tmp_path)


def test_a_resent_request_is_recognised_after_a_restart_with_a_backlog_of_many_segments(
    tmp_path: Path,
) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0), record(1)])
        run_until_empty(tmp_path)
        spooled(tmp_path, [record(1), *(record(n) for n in range(2, 20))], each_alone=True)
        run_until_empty(tmp_path)
    assert set(server.came.values()) == {1}
    assert (count(tmp_path, "resent"), delivered(tmp_path)) == (1, 20)
    assert_balanced(tmp_path)


def test_the_last_ids_of_several_segments_are_restored_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accountant_module, "_RECENT_BYTES", 4 * len(record(0)))
    for start in range(0, 400, 100):
        spooled(tmp_path, [record(n) for n in range(start, start + 100)])
    with accounting(tmp_path) as accountant:
        assert accountant.work() == 400
    spooled(tmp_path, [record(99), record(199), record(299), record(399)])
    with accounting(tmp_path) as accountant:
        accountant.work()
    assert (count(tmp_path, "resent"), count(tmp_path, "metered")) == (4, 400)


def test_the_number_of_recent_ids_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant_module, "_MAX_RECENT_IDS", 10)
    with accounting(tmp_path) as accountant:
        spooled(tmp_path, [record(n) for n in range(30)])
        accountant.work()
        spooled(tmp_path, [record(29), record(0)])
        accountant.work()
        assert len(accountant._recent) <= 10
    assert (count(tmp_path, "resent"), count(tmp_path, "metered")) == (1, 31)


def test_after_a_failed_commit_nothing_counts_as_resent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, failures = Books.account, [1, 2, 3]

    def failing(self: Books, *arguments: Any) -> None:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("database or disk is full")
        account(self, *arguments)

    monkeypatch.setattr(Books, "account", failing)
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0), record(1), record(0), skip()])
        run_until_empty(tmp_path)
    assert failures == []
    assert server.taken == ids(range(2))
    assert (count(tmp_path, "resent"), count(tmp_path, "requests")) == (1, 4)
    assert_balanced(tmp_path)


def test_a_resent_quarantined_request_is_kept_once(tmp_path: Path) -> None:
    spooled(tmp_path, [quarantined("a"), quarantined("b"), quarantined("a"), quarantined(None)], QUARANTINE)
    run_until_empty(tmp_path)
    spooled(tmp_path, [quarantined("b"), quarantined(None)], QUARANTINE)
    run_until_empty(tmp_path)
    assert count(tmp_path, "quarantined", queue=QUARANTINE) == 4
    assert count(tmp_path, "resent", queue=QUARANTINE) == 2
    assert_balanced(tmp_path)


# Records that cannot be parsed


@pytest.mark.parametrize(
    "payload",
    [EVENTS + b"\x01\x00\x00{", EVENTS + b"\x01\x00\x00[]", QUARANTINED + b"x", LOST + b"{}", b"Zfuture"],
    ids=["half", "list", "quarantined", "lost", "unknown kind"],
)
def test_a_valid_record_without_meaning_is_copied_to_damaged_and_stops_nothing(
    tmp_path: Path, payload: bytes
) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0), encode_record(payload), record(1)])
        with structlog.testing.capture_logs() as lines:
            run_until_empty(tmp_path)
    assert server.taken == ids(range(2))
    assert count(tmp_path, "damaged_bytes") == len(encode_record(payload))
    (copy,) = (tmp_path / "damaged").iterdir()
    assert copy.read_bytes() == encode_record(payload)
    assert [line for line in lines if line["event"] == "spool_damaged"]
    assert_balanced(tmp_path)


def test_a_record_without_meaning_is_not_sent_after_a_restart_either(tmp_path: Path) -> None:
    with serving(EventsServer(lambda _: Answer(503))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [encode_events([b"no JSON"]), record(1)])
        with delivering(tmp_path):
            eventually(lambda: waiting(tmp_path) == 1 and server.posts, what="a try")
        server.script = take_all
        run_until_empty(tmp_path)
    assert server.taken == ids(range(1, 2))
    assert [post for post in server.posts if b"no JSON" in post.body] == []
    assert_balanced(tmp_path)


def test_a_resent_request_without_a_summary_is_recognised_after_a_restart(tmp_path: Path) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [encode_events([event(0)]), record(1)])
        run_until_empty(tmp_path)
        spooled(tmp_path, [encode_events([event(0)]), encode_events([event(2)])])
        run_until_empty(tmp_path)
    assert server.came == {"event-000000": 1, "event-000001": 1, "event-000002": 1}
    assert (count(tmp_path, "resent"), count(tmp_path, "metered")) == (1, 3)
    assert_balanced(tmp_path)


# Any order of events


class Delivery_(RuleBasedStateMachine):  # noqa: N801 - its TestCase has the name
    """Two workers that write, and one queue's delivery whose process may end at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.spool = Path(self.directory.name)
        (queues_directory(self.spool) / QUEUE).mkdir(parents=True)
        self.workers: list[Segment | None] = [None, None]
        self.next, self.skips, self.resends = 0, 0, 0
        self.sent: Counter[str] = Counter()
        self.may_come_again: Counter[str] = Counter()
        self.dead: set[str] = set()
        self._open()

    def _open(self) -> None:
        self.books = Books(self.spool)
        self.reader = QueueReader(
            queues_directory(self.spool) / QUEUE,
            self.books.positions(QUEUE),
            unsent=self.books.resent(QUEUE),
        )
        self.accountant = Accountant(self.spool, QUEUE, self.books, self.reader)
        self.batches = BatchReader(self.reader)

    def _close(self) -> None:
        self.reader.close()
        self.books.close()

    def _write(self, worker: int, data: bytes) -> None:
        segment = self.workers[worker]
        if segment is None:
            segment = self.workers[worker] = Segment(queues_directory(self.spool) / QUEUE)
        assert segment.append(data) == len(data)

    @rule(worker=st.integers(0, 1), number=st.integers(1, 5), events=st.integers(1, 3))
    def write_usage(self, worker: int, number: int, events: int) -> None:
        for _ in range(number):
            self._write(worker, record(*range(self.next, self.next + events), subject=f"s{self.next % 3}"))
            self.next += events

    @rule(worker=st.integers(0, 1))
    def write_skip(self, worker: int) -> None:
        self._write(worker, skip())
        self.skips += 1

    @rule(worker=st.integers(0, 1))
    def kong_resends_a_request(self, worker: int) -> None:
        self._write(worker, record(self.next))
        self._write(1 - worker, record(self.next))
        self.next += 1
        self.resends += 1

    @rule(worker=st.integers(0, 1), torn=st.booleans())
    def end_worker(self, worker: int, torn: bool) -> None:
        segment = self.workers[worker]
        if segment is not None:
            if torn:
                segment.append(record(self.next)[:-5])
            segment.close()
            self.workers[worker] = None

    @rule(fails=st.booleans())
    def account(self, fails: bool) -> None:
        if not fails:
            self.accountant.work()
            return
        entry, self.books.account = self.books.account, _full  # type: ignore[method-assign, assignment]
        try:
            self.accountant.work()
        except sqlite3.OperationalError:
            pass
        finally:
            self.books.account = entry  # type: ignore[method-assign]

    @rule(most=st.integers(1, 6), killed=st.booleans(), refused=st.booleans())
    def send(self, most: int, killed: bool, refused: bool) -> None:
        batch = Batch()
        self.batches.extend(batch, most)
        events = [orjson.dumps(e) for e in orjson.loads(b"[" + b",".join(batch.events) + b"]")]
        found = [orjson.loads(e)["id"] for e in events]
        self.sent.update(found)
        if killed:
            self.may_come_again.update(found)
            self.books.close()  # as the process that held it; nothing was committed
            self._open()
            return
        delivery = Delivery(batch.positions, batch.lines(), events=batch.event_count)
        if refused and events:
            self.dead.add(found[0])
            key = ledger_key(orjson.loads(events[0]))
            delivery.delivered[key] -= 1
            delivery.dead_lettered[key] += 1
        self.books.deliver(QUEUE, delivery)
        self.batches.delivered()

    @rule()
    def restart(self) -> None:
        self._close()
        self._open()

    @invariant()
    def both_equations_hold(self) -> None:
        assert_balanced(self.spool)
        assert not {i: n for i, n in self.sent.items() if n > 1 + self.may_come_again[i]}

    def teardown(self) -> None:
        for worker in range(2):
            self.end_worker(worker=worker, torn=False)
        while self.accountant.work():
            pass
        while True:
            batch = Batch()
            self.batches.extend(batch, 7)
            if not batch.positions:
                break
            self.sent.update(e["id"] for e in orjson.loads(b"[" + b",".join(batch.events) + b"]"))
            self.books.deliver(QUEUE, Delivery(batch.positions, batch.lines(), events=batch.event_count))
        self.both_equations_hold()
        counts = read_counts(self.spool).get(QUEUE, Counter())
        assert counts["events", ""] == self.next == counts["delivered", ""] + counts["dead_lettered", ""]
        assert (counts["skipped", "no_consumer"], counts["resent", ""]) == (self.skips, self.resends)
        assert set(self.sent) == set(ids(range(self.next)))
        self._close()
        self.directory.cleanup()


def _full(*_: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full")


TestAnyOrder = Delivery_.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
