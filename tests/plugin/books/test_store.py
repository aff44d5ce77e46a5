"""The store of the books: each commit is atomic, whatever happens to the file."""

from __future__ import annotations

import sqlite3
import stat
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.books import ledger
from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.store import Accounting, Books, DeadLetter, Delivery, LedgerKey, Lines
from openmeter_plugin.spool.reader import Position
from tests.harness.books import LedgerLine, read_counts, read_dead_letters, read_ledger

DEAD = DeadLetter(b'{"id":"1"}', 400, "it is bad")


def counts(**values: int) -> Counter[tuple[str, str]]:
    return Counter({(name, ""): value for name, value in values.items()})


def accounting(accepted: Lines, skipped: dict[str, int] | None = None) -> Accounting:
    """Return what is committed for these events and skips, each of a request of its own."""
    whole = Accounting(counts=counts(metered=accepted.total(), events=accepted.total()), accepted=accepted)
    whole.counts.update({("skipped", reason): number for reason, number in (skipped or {}).items()})
    whole.count_requests()
    return whole


def accounted(positions: dict[str, int], events: int = 0) -> Accounting:
    whole = accounting(Counter({KEY: events} if events else {}))
    whole.positions = positions
    return whole


def commit_positions(spool: Path, positions: dict[str, int]) -> None:
    with closing(Books(spool)) as books:
        books.account("q", accounted(positions, events=len(positions)))


def offsets(books: Books, queue: str = "q") -> dict[str, int]:
    return {name: position.accounted for name, position in books.positions(queue).items()}


def damaged_copies(spool: Path) -> list[str]:
    return sorted(path.name for path in spool.glob(f"{FILE}.damaged-*"))


KEY = LedgerKey("2026-11-22T07", "kong.api_request", "alice")


def test_a_position_is_the_last_committed_one(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        books.account("q", accounted({"a": 10, "b": 20}))
        books.account("q", accounted({"b": 30}))
        books.account("other", accounted({"a": 99}))
        books.deliver("q", Delivery({"b": 25}, events=0))
        assert books.positions("q") == {"a": Position(10, 0), "b": Position(30, 25)}
        assert books.positions("unknown") == {}


def test_committed_positions_survive_closing_the_file(tmp_path: Path) -> None:
    commit_positions(tmp_path, {"a": 10})
    with closing(Books(tmp_path)) as books:
        assert books.positions("q") == {"a": Position(10, 0)}


def test_a_commit_is_visible_to_other_readers_at_once(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        books.account("q", accounted({"a": 10}, events=1))
        books.deliver(
            "q", Delivery({"a": 10}, dead_lettered=Counter({KEY: 1}), dead_letters=[DEAD], events=1)
        )
        assert read_counts(tmp_path) == {"q": counts(requests=1, metered=1, events=1, dead_lettered=1)}
        assert read_dead_letters(tmp_path) == [(1, "q", DEAD)]


def test_counts_add_up_by_queue_name_and_reason(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        books.account("q", accounting(Counter({KEY: 3}), {"a": 1, "b": 2}))
        books.account("q", accounting(Counter(), {"a": 10}))
        books.account("r", accounting(Counter(), {"a": 100}))
    assert read_counts(tmp_path) == {
        "q": counts(requests=16, metered=3, events=3, waiting=3)
        + Counter({("skipped", "a"): 11, ("skipped", "b"): 2}),
        "r": counts(requests=100) + Counter({("skipped", "a"): 100}),
    }


def test_the_ledger_has_a_line_for_each_queue_hour_type_and_subject(tmp_path: Path) -> None:
    later, other, typed = (
        KEY._replace(**change)
        for change in ({"hour": "2026-11-22T08"}, {"subject": "bob"}, {"type": "kong.llm_request"})
    )
    with closing(Books(tmp_path)) as books:
        books.account("q", accounting(Counter({KEY: 5, later: 1, other: 2, typed: 3})))
        books.account("r", accounting(Counter({KEY: 7})))
        books.deliver("q", Delivery({}, Counter({KEY: 4, other: 2}), Counter({KEY: 1}), events=7))
    assert read_ledger(tmp_path) == [
        LedgerLine("q", *KEY, 5, 4, 1),
        LedgerLine("r", *KEY, 7, 0, 0),
        LedgerLine("q", *typed, 3, 0, 0),
        LedgerLine("q", *other, 2, 2, 0),
        LedgerLine("q", *later, 1, 0, 0),
    ]
    assert [line.hour for line in ledger.read_ledger(tmp_path, since="2026-11-22T08").lines] == [later.hour]
    assert {line.hour for line in ledger.read_ledger(tmp_path, until="2026-11-22T08").lines} == {KEY.hour}
    assert [line.subject for line in ledger.read_ledger(tmp_path, subject="bob").lines] == ["bob"]
    assert read_counts(tmp_path)["q"] == counts(
        requests=11, metered=11, events=11, delivered=6, dead_lettered=1, waiting=4
    )


def test_only_the_removed_segment_is_forgotten(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as books:
        books.account("q", Accounting({"a": 1, "b": 2}, resent=[("a", 1), ("b", 2)]))
        books.account("r", Accounting({"a": 3}, resent=[("a", 3)]))
        books.forget("q", "a")
        assert (offsets(books, "q"), offsets(books, "r")) == ({"b": 2}, {"a": 3})
        assert (books.resent("q"), books.resent("r")) == ({("b", 2)}, {("a", 3)})


def test_a_failed_commit_leaves_nothing_behind(tmp_path: Path) -> None:
    broken: Any = DeadLetter(b"{}", 400, None)  # type: ignore[arg-type]
    with closing(Books(tmp_path)) as books:
        books.account("q", accounted({"a": 1}, events=1))
        with pytest.raises(sqlite3.IntegrityError):
            books.deliver("q", Delivery({"a": 1}, Counter({KEY: 5}), dead_letters=[DEAD, broken], events=7))
        unreadable: Any = (None, b"{}")
        with pytest.raises(sqlite3.IntegrityError):
            books.account("q", Accounting({"a": 2}, counts(lost=5), quarantined=[unreadable]))
        assert books.positions("q") == {"a": Position(1, 0)}
        books.account("q", accounted({"a": 3}, events=1))
        assert offsets(books) == {"a": 3}
    assert read_counts(tmp_path) == {"q": counts(requests=2, metered=2, events=2, waiting=2)}
    assert read_dead_letters(tmp_path) == []
    assert read_ledger(tmp_path) == [LedgerLine("q", *KEY, 2, 0, 0)]


def test_dead_letters_are_read_in_the_order_they_were_committed(tmp_path: Path) -> None:
    letters = [DeadLetter(b'{"n":%d}' % n, 400 + n, f"answer {n}") for n in range(5)]
    with closing(Books(tmp_path)) as books:
        books.deliver("q", Delivery({}, dead_letters=letters[:2], events=0))
        books.deliver("r", Delivery({}, dead_letters=letters[2:], events=0))
    assert read_dead_letters(tmp_path) == list(zip(range(1, 6), "qqrrr", letters, strict=True))


def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    with closing(Books(tmp_path)):
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_spool_that_was_never_delivered_has_no_books(tmp_path: Path) -> None:
    assert read_counts(tmp_path) == {}
    assert read_dead_letters(tmp_path) == []
    assert read_ledger(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"no database" * 100, bytes(5000), b"SQLite format 3\x00junk"])
def test_a_file_that_is_not_a_database_is_renamed_and_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with structlog.testing.capture_logs() as lines, closing(Books(tmp_path)) as books:
        books.account("q", accounted({"a": 1}))
        assert offsets(books) == {"a": 1}
    (name,) = damaged_copies(tmp_path)
    assert (tmp_path / name).read_bytes() == content
    assert [(line["event"], line["renamed_to"]) for line in lines] == [("books_damaged", name)]


@pytest.mark.parametrize("page", range(1, 4))
def test_a_file_with_a_damaged_page_is_renamed_before_it_can_stop_the_delivery(
    tmp_path: Path, page: int
) -> None:
    commit_positions(tmp_path, {f"segment {n}": n for n in range(20)})
    file = tmp_path / FILE
    content = bytearray(file.read_bytes())
    content[page * 4096 : page * 4096 + 2000] = b"\xa5" * 2000
    file.write_bytes(content)
    with closing(Books(tmp_path)) as books:
        assert offsets(books) == {}
        books.account("q", accounted({"a": 1}, events=1))
        books.deliver("q", Delivery({}, dead_letters=[DEAD], events=0))
    assert len(damaged_copies(tmp_path)) == 1


def test_a_file_that_is_just_being_created_has_no_counts_and_no_dead_letters(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    assert read_counts(tmp_path) == {}
    assert read_dead_letters(tmp_path) == []


def test_an_empty_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    commit_positions(tmp_path, {"a": 1})
    assert damaged_copies(tmp_path) == []


def test_a_locked_file_is_not_taken_for_damaged(tmp_path: Path) -> None:
    commit_positions(tmp_path, {"a": 1})
    with closing(Books(tmp_path)) as books:
        books._db.execute("PRAGMA busy_timeout = 10")
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                books.account("q", accounted({"a": 2}))
        books.account("q", accounted({"a": 3}))
        assert offsets(books) == {"a": 3}
    assert damaged_copies(tmp_path) == []
