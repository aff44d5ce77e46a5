"""Dead letters by their answer: which answers mean the same, what a replay did, and books of before."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.books.database import FILE, migrate
from openmeter_plugin.books.quarantine import read_groups as read_quarantine_groups
from openmeter_plugin.books.quarantine import read_quarantine
from openmeter_plugin.books.refusals import (
    read_dead_letter,
    read_dead_letters,
    read_groups,
    read_replay,
    read_replays,
    refusal_group,
    refusal_of,
)
from openmeter_plugin.books.replay import Selection, start_replay
from openmeter_plugin.books.store import Accounting, Books, DeadLetter, Delivery, LedgerKey
from openmeter_plugin.delivery.answers import MAX_TEXT
from openmeter_plugin.foreign import foreign_text
from tests.checkout import ROOT

LINE = LedgerKey("2026-11-22T07", "kong.api_request", "consumer:alice")
OM_WIRE = ROOT / "tests" / "data" / "om-wire"


def problem(detail: str, title: str = "Bad Request", **members: object) -> str:
    return orjson.dumps(
        {"type": "about:blank", "title": title, "status": 400, "detail": detail} | members
    ).decode()


def spool_with(folder: Path, *answers: tuple[str, int | None, str]) -> Path:
    """A spool with a dead letter for each (queue, status, answer)."""
    with closing(Books(folder)) as books:
        for number, (queue, status, answer) in enumerate(answers):
            event = orjson.dumps({"id": f"e{number}", "type": LINE.type, "subject": LINE.subject, "data": {}})
            books.account(queue, Accounting(positions={"1.seg": number + 1}, accepted=_one()))
            letter = DeadLetter(event, status, answer)
            books.deliver(
                queue, Delivery({"1.seg": number + 1}, dead_lettered=_one(), dead_letters=[letter], events=1)
            )
    return folder


def _one() -> Counter[LedgerKey]:
    return Counter({LINE: 1})


@pytest.mark.parametrize(
    ("answer", "title", "detail"),
    [
        (problem("subject is missing"), "Bad Request", "subject is missing"),
        (problem("a\n  b"), "Bad Request", "a b"),
        ("no JSON at all", "", "no JSON at all"),
        ("{not JSON", "", "{not JSON"),
        ('{"other": 1}', "", '{"other": 1}'),
        ("[1]", "", "[1]"),
        ('{"title": 7, "detail": null}', "", '{"title": 7, "detail": null}'),
        (
            problem("", invalid_parameters=[{"field": "1.time", "reason": "no time"}, 3, {}]),
            "Bad Request",
            "1.time: no time",
        ),
    ],
)
def test_an_answer_is_told_by_its_title_and_detail(answer: str, title: str, detail: str) -> None:
    assert refusal_of(answer) == (title, detail)


def test_an_answer_that_was_cut_off_still_has_its_title_and_detail() -> None:
    whole = problem('Error at "/1/subject": ' + "x" * 3000)
    cut = foreign_text(whole, limit=MAX_TEXT)
    assert cut.endswith("…")
    refusal = refusal_of(cut)
    assert refusal.title == "Bad Request"
    assert refusal.detail.startswith('Error at "/1/subject": xxx')


def recorded_refusals() -> list[str]:
    found = []
    for name in ("v1-events.jsonl", "v3-events.jsonl"):
        for line in (OM_WIRE / name).read_text().splitlines():
            answer = json.loads(line)["response"]
            if answer["status"] == 400 and isinstance(answer["body"], dict):
                found.append(orjson.dumps(answer["body"]).decode())
    return found


def test_what_openmeter_really_answers_has_a_title_and_a_detail() -> None:
    assert len(recorded_refusals()) > 10
    for answer in recorded_refusals():
        refusal = refusal_of(answer)
        assert refusal.title, answer
        assert refusal.detail, answer
        assert not refusal.text.startswith("Bad Request: Bad Request")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (problem('Error at "/1/subject"'), problem('Error at "/73/subject"'), True),
        (problem("1.subject [required]"), problem("99.subject [required]"), True),
        (problem("1.subject [required]"), problem("1.time [required]"), False),
        (problem("event 01M8HR1JTQM0YGDV85PJ57AY0H"), problem("event 01M8HR2YYTR37B9G1NS4XHP56G"), True),
        (problem("a", instance="urn:1"), problem("a", instance="urn:2"), True),
        (problem("a"), problem("a", title="Conflict"), False),
        ("plain 1", "plain 2", True),
        ("plain", "other", False),
    ],
)
def test_answers_are_of_one_group_if_they_differ_in_numbers_only(one: str, other: str, same: bool) -> None:
    assert (refusal_group("q", 400, one) == refusal_group("q", 400, other)) is same
    assert refusal_group("q", 400, one) != refusal_group("r", 400, one)
    assert refusal_group("q", 400, one) != refusal_group("q", None, one)


def test_dead_letters_are_grouped_with_the_words_of_the_newest(tmp_path: Path) -> None:
    several = [("q", 400, problem(f"Error at {number}")) for number in range(3)]
    spool = spool_with(tmp_path, *several, ("q", None, "too old"), ("r", 400, problem("Error at 9")))
    found = read_groups(spool)
    assert next(
        (group.destination, group.status, group.detail, group.dead_letters) for group in found.groups
    ) == ("q", 400, "Error at 2", 3)
    assert (found.dead_letters, found.to_be_replayed, found.newest_id) == (5, 0, 5)
    first = found.groups[0]
    assert [letter.id for letter in read_dead_letters(spool, group=first.id).dead_letters] == [1, 2, 3]
    page = read_dead_letters(spool, group=first.id, limit=2)
    assert page.next == 2
    assert [letter.id for letter in read_dead_letters(spool, group=first.id, after=2).dead_letters] == [3]
    assert read_groups(spool, limit=1).further_groups == 2


def test_a_dead_letter_is_shown_with_its_event(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, ("q", 400, "no"))
    letter = read_dead_letter(spool, 1)
    assert letter
    assert letter.event == {"id": "e0", "type": LINE.type, "subject": LINE.subject, "data": {}}
    assert read_dead_letter(spool, 2) is None


def test_a_group_is_replayed_up_to_the_dead_letter_that_was_seen(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, *[("q", 400, problem(f"at {n}")) for n in range(4)], ("q", 400, "other"))
    group = read_groups(spool).groups[0]
    started = start_replay(spool, Selection(group=group.id, up_to=3))
    assert started.marked == 3
    assert [letter.to_be_replayed for letter in read_dead_letters(spool).dead_letters] == [
        *[True] * 3,
        *[False] * 2,
    ]
    assert read_groups(spool).groups[0].to_be_replayed == 3
    assert start_replay(spool, Selection(group="0" * 16)) == (None, 0)


def test_a_replay_counts_what_became_of_its_dead_letters(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, *[("q", 400, f"answer {n}") for n in range(4)])
    first = start_replay(spool, Selection(ids=[1, 2])).id
    second = start_replay(spool, Selection()).id
    assert first
    assert second
    with closing(Books(spool)) as books:
        books.replayed("q", {1: LINE, 3: LINE}, {2: DeadLetter(b"{}", 400, "again")})
    found = [(r.id, r.marked, r.delivered, r.refused, r.waiting) for r in read_replays(spool).replays]
    assert found == [(second, 2, 1, 0, 1), (first, 2, 1, 1, 0)]
    assert read_replay(spool, first) == read_replays(spool).replays[1]
    assert read_replay(spool, 99) is None
    again = start_replay(spool, Selection()).id  # the refused one may be replayed again, under a new replay
    assert again
    assert again not in (first, second)
    assert read_replays(spool).replays[0].marked == 1


def test_of_replays_at_the_same_time_each_dead_letter_has_one_and_none_is_empty(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, *[("q", 400, "no")] * 1500)
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: start_replay(spool, Selection()), range(4)))
    assert sum(one.marked for one in started) == 1500
    listed = {one.id: one.marked for one in read_replays(spool).replays}
    assert listed == {one.id: one.marked for one in started if one.id is not None}
    assert all(listed.values())
    assert start_replay(spool, Selection(ids=[1, 2])) == (None, 0), "they are marked already"
    assert len(read_replays(spool).replays) == len(listed)


def migrate_from_version_2(spool: Path) -> None:
    with closing(sqlite3.connect(spool / FILE, isolation_level=None)) as db:
        db.execute("DROP TABLE replays")
        db.execute("PRAGMA user_version = 2")
        migrate(db)


def test_books_of_the_version_before_without_marks_have_no_replay(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, ("q", 400, "no"))
    migrate_from_version_2(spool)
    assert read_replays(spool).replays == []


def test_marks_of_books_of_the_version_before_become_a_replay(tmp_path: Path) -> None:
    spool = spool_with(tmp_path, *[("q", 400, "no")] * 3)
    start_replay(spool, Selection(ids=[1, 2]))
    migrate_from_version_2(spool)
    (replay,) = read_replays(spool).replays
    assert (replay.id, replay.marked, replay.waiting) == (1, 2, 2)
    with closing(Books(spool)) as books:
        books.replayed("q", {1: LINE}, {})
    assert read_replays(spool).replays[0].delivered == 1


def test_the_quarantine_is_grouped_by_reason_and_read_in_pages(tmp_path: Path) -> None:
    record = {
        "reason": "no_consumer",
        "log": {"request": {"id": "r1"}},
        "destination": "q",
        "application": None,
    }
    with closing(Books(tmp_path)) as books:
        raw = orjson.dumps(record | {"attributes": {"tier": "gold"}})
        faulty = orjson.dumps({"reason": "subject.field: is required", "log": {}, "application": None})
        quarantined = [("no_consumer", raw), ("no_consumer", raw), ("subject.field: is required", faulty)]
        books.account("quarantine", Accounting(quarantined=quarantined))
    groups = read_quarantine_groups(tmp_path)
    assert [(group.reason, group.requests) for group in groups.groups] == [
        ("no_consumer", 2),
        ("subject.field: is required", 1),
    ]
    assert groups.requests == 3
    page = read_quarantine(tmp_path, reason="no_consumer", limit=1)
    assert (page.next, page.requests[0].attributes, page.requests[0].destination) == (
        1,
        {"tier": "gold"},
        "q",
    )
    assert [entry.id for entry in read_quarantine(tmp_path, reason="no_consumer", after=1).requests] == [2]
    assert re.fullmatch(r"20.*Z", read_quarantine(tmp_path).requests[2].at)
