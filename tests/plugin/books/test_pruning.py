"""Pruning of the ledger: only old settled lines are pruned, and the books stay balanced."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from openmeter_plugin.books import pruning as pruning_module
from openmeter_plugin.books.ledger import read_ledger as page_of_ledger
from openmeter_plugin.books.pruning import Pruned
from openmeter_plugin.books.read_models import all_pruned, reading
from openmeter_plugin.books.status import read_status
from openmeter_plugin.books.store import Accounting, Books, DeadLetter, Delivery, LedgerKey, Lines
from openmeter_plugin.delivery import process as process_module
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_counts, read_ledger
from tests.harness.process import eventually
from tests.plugin.deliveries import delivered, delivering, record, rejects, run_until_empty, spooled
from tests.plugin.events_server import EventsServer, serving
from tests.plugin.spools import QUEUE, destination

NOW = datetime(2026, 11, 22, 7, 30, tzinfo=UTC)


def hour(days_ago: float) -> str:
    return (NOW - timedelta(days=days_ago)).isoformat()[:13]


def key(days_ago: float, subject: str = "alice") -> LedgerKey:
    return LedgerKey(hour(days_ago), "kong.api_request", subject)


def account(books: Books, lines: Lines, queue: str = "q") -> None:
    books.account(queue, Accounting(accepted=lines, counts=Counter({("events", ""): lines.total()})))


def settled(books: Books, lines: Lines, queue: str = "q") -> None:
    account(books, lines, queue)
    books.deliver(queue, Delivery({}, delivered=lines, events=lines.total()))


def pruned(spool: Path) -> dict[str, Pruned]:
    with reading(spool) as db:
        return all_pruned(db)


def test_old_settled_lines_are_pruned_and_their_totals_kept(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(12): 5, key(11, "bob"): 3, key(9): 2, key(0): 1}))
        settled(books, Counter({key(30): 7}), "r")
        assert books.prune(10, NOW) == 3
        assert books.prune(10, NOW) == 0
    assert [(line.queue, line.hour, line.accepted) for line in read_ledger(tmp_path)] == [
        ("q", hour(9), 2),
        ("q", hour(0), 1),
    ]
    assert pruned(tmp_path) == {"q": Pruned(hour(11), 2, 8), "r": Pruned(hour(30), 1, 7)}
    assert verify(tmp_path).ok, verify(tmp_path).differences


def test_a_line_is_pruned_once_its_hour_is_old_enough_and_not_before(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(10): 1, key(0): 1}))
        assert books.prune(10, NOW) == 0
        settled(books, Counter({key(-1 / 24): 1}))  # the hour after this one
        assert books.prune(10, NOW) == 0  # it is in the future
        assert books.prune(10, NOW + timedelta(hours=1)) == 1


def test_with_0_days_nothing_is_ever_pruned(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(10_000): 1, key(0): 1}))
        assert books.prune(0, NOW) == 0
    assert len(read_ledger(tmp_path)) == 2


def test_waiting_events_and_dead_letters_keep_their_line_until_they_are_settled(tmp_path: Path) -> None:
    waits, died = key(50), key(60)
    letter = DeadLetter(
        orjson.dumps({"time": f"{died.hour}:00:00Z", "type": died.type, "subject": "alice"}), 400, ""
    )
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(0): 1}))
        account(books, Counter({waits: 3, died: 2}))
        books.deliver("q", Delivery({}, Counter({waits: 2, died: 1}), Counter({died: 1}), [letter], events=4))
        assert books.prune(10, NOW) == 0
        books.deliver("q", Delivery({}, Counter({waits: 1}), events=1))
        assert books.prune(10, NOW) == 1
        books.replayed("q", {1: died}, {})
        assert books.prune(10, NOW) == 1
    assert pruned(tmp_path) == {"q": Pruned(waits.hour, 2, 5)}
    assert verify(tmp_path).ok, verify(tmp_path).differences


def test_each_step_prunes_a_few_lines_and_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_module, "_LINES_PER_STEP", 4)
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(days): 1 for days in range(20, 30)} | {key(0): 1}))
        left = []
        while books.prune(10, NOW):
            left.append(min(line.hour for line in read_ledger(tmp_path)))
    assert left == [hour(25), hour(21), hour(0)]


def test_a_clock_that_is_ahead_prunes_only_what_is_old_relative_to_the_newest_usage(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(12): 1, key(9): 1, key(0): 1}))
        assert books.prune(10, NOW + timedelta(days=3650)) == 1
    assert [line.hour for line in read_ledger(tmp_path)] == [hour(9), hour(0)]


def test_usage_with_a_future_time_makes_nothing_old(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(9): 1, key(-3650): 1}))
        assert books.prune(10, NOW) == 0


@pytest.mark.parametrize("odd", ["", "yesterday", "2026-13-40T99", "0"])
def test_a_line_without_a_valid_hour_stays_and_stops_nothing(tmp_path: Path, odd: str) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({LedgerKey(odd, "t", "s"): 1, key(12): 1, key(0): 1}))
        books.prune(10, NOW)
    assert odd in {line.hour for line in read_ledger(tmp_path)}


def test_a_failed_commit_prunes_nothing(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(12): 1, key(0): 1}))
        books._db.execute("DROP TABLE ledger_pruned")
        with pytest.raises(sqlite3.OperationalError):
            books.prune(10, NOW)
    assert len(read_ledger(tmp_path)) == 2


# By the delivery process, and in its reports


def test_a_delivery_prunes_and_status_ledger_and_verify_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_PRUNE_STEP_INTERVAL", 0.02)
    monkeypatch.setattr(process_module, "_PRUNE_INTERVAL", 0.02)
    old, young = (datetime.now(UTC) - timedelta(days=days) for days in (402, 398))
    stamps = [moment.strftime("%Y-%m-%dT%H:00:00.000Z") for moment in (old, young, datetime.now(UTC))]
    with serving(EventsServer(rejects({"event-000005"}))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n, time=stamps[0]) for n in range(4)])
        spooled(tmp_path, [record(n, subject="bob", time=stamps[0]) for n in (4, 5)])
        spooled(tmp_path, [record(6, time=stamps[1]), record(7, time=stamps[2])])
        with delivering(tmp_path):
            eventually(lambda: pruned(tmp_path), what="the pruning")
            assert delivered(tmp_path) == 7
    status, found, page = read_status(tmp_path), verify(tmp_path), page_of_ledger(tmp_path)
    assert found.ok, found.differences
    assert (found.ledger_lines, found.pruned_events) == (3, 4)
    (ours,) = (d for d in status.destinations if d.id == QUEUE)
    assert status.total.pruned == ours.pruned
    assert ours.pruned is not None
    assert (ours.pruned.up_to, ours.pruned.lines, ours.pruned.events) == (stamps[0][:13], 1, 4)
    assert ours.books.delivered == 7
    assert page.pruned_up_to == stamps[0][:13]
    assert {line.subject for line in page.lines if line.hour == stamps[0][:13]} == {"bob"}


def test_a_drain_prunes_nothing(tmp_path: Path) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1, time="2020-01-01T00:00:00.000Z"), record(2)])
        run_until_empty(tmp_path, ledger_days=1)
    assert (len(read_ledger(tmp_path)), pruned(tmp_path)) == (2, {})


def test_verify_reports_pruned_lines_that_are_missing_from_the_totals(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        settled(books, Counter({key(12): 5, key(0): 1}))
        books.prune(10, NOW)
        books._db.execute("UPDATE ledger_pruned SET events = events - 1")
    found = verify(tmp_path)
    assert [d for d in found.differences if "accepted events are 6 in the counts and 1 in the ledger" in d]


def test_by_default_the_ledger_is_kept_for_400_days(tmp_path: Path) -> None:
    assert DeliveryOptions(tmp_path).ledger_days == 400


# Any order of events


class Ledger_(RuleBasedStateMachine):  # noqa: N801 - its TestCase has the name
    """Usage that is accepted, delivered, refused and replayed, while time passes and old lines are pruned."""

    keys = st.builds(LedgerKey, st.integers(0, 40).map(hour), st.just("t"), st.sampled_from("abc"))
    queues = st.sampled_from(["q", "r"])

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.spool = Path(self.directory.name)
        self.books = Books(self.spool)
        self.now = NOW
        self.open: Counter[tuple[str, LedgerKey]] = Counter()
        self.letters: list[tuple[str, LedgerKey]] = []
        self.accepted: Counter[str] = Counter()

    @rule(queue=queues, key=keys, number=st.integers(1, 4))
    def accept(self, queue: str, key: LedgerKey, number: int) -> None:
        account(self.books, Counter({key: number}), queue)
        self.open[queue, key] += number
        self.accepted[queue] += number

    @rule(data=st.data(), refused=st.booleans())
    def deliver(self, data: st.DataObject, refused: bool) -> None:
        waiting = sorted(line for line, number in self.open.items() if number)
        if not waiting:
            return
        queue, key = line = data.draw(st.sampled_from(waiting))
        number = self.open.pop(line)
        dead = Counter({key: 1}) if refused else Counter()
        event = orjson.dumps({"time": key.hour, "type": key.type, "subject": key.subject})
        letters = [DeadLetter(event, 400, "no")] if refused else []
        self.books.deliver(queue, Delivery({}, Counter({key: number}) - dead, dead, letters, events=number))
        self.letters += [line] if refused else []

    @rule()
    def replay(self) -> None:
        for queue in {queue for queue, _ in self.letters}:
            self.books._db.execute("UPDATE dead_letters SET replay = 1")
            rows = self.books.to_replay(queue, 100, 10_000)
            replayed = {
                n: LedgerKey(*(orjson.loads(e)[m] for m in ("time", "type", "subject"))) for n, e in rows
            }
            self.books.replayed(queue, replayed, {})
        self.letters = []

    @rule(days=st.integers(0, 30))
    def prune(self, days: int) -> None:
        before = {(line.queue, line.hour, line.subject) for line in read_ledger(self.spool)}
        self.books.prune(days, self.now)
        gone = before - {(line.queue, line.hour, line.subject) for line in read_ledger(self.spool)}
        assert not gone or days
        assert all(line[1] < (self.now - timedelta(days=days)).isoformat()[:13] for line in gone)

    @rule(days=st.integers(1, 10))
    def time_goes_on(self, days: int) -> None:
        self.now += timedelta(days=days)

    @rule()
    def restart(self) -> None:
        self.books.close()
        self.books = Books(self.spool)

    @invariant()
    def the_books_add_up_and_nothing_open_is_gone(self) -> None:
        gone = pruned(self.spool)
        for queue, counts in read_counts(self.spool).items():
            lines = [line for line in read_ledger(self.spool) if line.queue == queue]
            events = gone[queue].events if queue in gone else 0
            assert counts["events", ""] == self.accepted[queue] == events + sum(x.accepted for x in lines)
            assert counts["delivered", ""] == events + sum(x.delivered for x in lines)
            assert counts["dead_lettered", ""] == sum(x.dead_lettered for x in lines)
        there = {
            (line.queue, LedgerKey(line.hour, line.type, line.subject)): line
            for line in read_ledger(self.spool)
        }
        for place, number in self.open.items():
            if number:
                line = there[place]
                assert line.accepted - line.delivered - line.dead_lettered == number
        for place, number in Counter(self.letters).items():
            assert there[place].dead_lettered == number

    def teardown(self) -> None:
        self.books.close()
        self.directory.cleanup()


TestAnyOrder = Ledger_.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
