"""Replay of dead letters and redelivery of retained events; the books stay balanced."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.books import replay as replay_module
from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.read_models import reading
from openmeter_plugin.books.replay import replay_dead_letters, request_redelivery
from openmeter_plugin.delivery.dead_letters import permit
from openmeter_plugin.maintenance.quarantine_replay import QuarantineReplay, replay_quarantine
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    rejects,
    run_until_empty,
    spooled,
)
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spool_commands import run
from tests.plugin.spools import QUEUE, destination

pytestmark = pytest.mark.slow

BEGINNING, END = "2000-01-01T00:00:00Z", "2100-01-01T00:00:00Z"


def with_dead_letters(spool: Path, server: EventsServer, bad: set[int], number: int = 10) -> None:
    server.script = rejects({f"event-{n:06d}" for n in bad})
    write_destination(spool, destination(server.url))
    spooled(spool, [record(n) for n in range(number)])
    run_until_empty(spool)


def dead(spool: Path) -> dict[int, str]:
    return {number: orjson.loads(letter.event)["id"] for number, _, letter in read_dead_letters(spool)}


# Dead letters


def test_a_replayed_dead_letter_that_is_delivered_is_no_longer_a_dead_letter(
    tmp_path: Path, server: EventsServer
) -> None:
    with_dead_letters(tmp_path, server, {3, 4})
    server.script = lambda _: Answer()
    assert replay_dead_letters(tmp_path) == 2
    run_until_empty(tmp_path)
    assert dead(tmp_path) == {}
    assert sorted(server.taken) == ids(range(10))
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (10, 0)
    assert_balanced(tmp_path)


def test_a_dead_letter_that_is_refused_again_keeps_the_new_answer_and_is_not_retried(
    tmp_path: Path, server: EventsServer
) -> None:
    with_dead_letters(tmp_path, server, {3, 4})
    server.script = lambda post: refusal(422, "new") if "event-000004" in post.ids else Answer()
    replay_dead_letters(tmp_path)
    run_until_empty(tmp_path)
    ((number, _, letter),) = read_dead_letters(tmp_path)
    assert (number, letter.status) == (2, 422)
    assert '"detail":"new"' in letter.answer
    posts = len(server.posts)
    run_until_empty(tmp_path)
    assert len(server.posts) == posts
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (9, 1)
    assert_balanced(tmp_path)


def test_only_the_named_dead_letters_are_replayed_each_marked_once(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "_PER_TRANSACTION", 2)
    with_dead_letters(tmp_path, server, set(range(7)))
    server.script = lambda _: Answer()
    assert replay_dead_letters(tmp_path, [2, 3, 5, 99]) == 3
    assert replay_dead_letters(tmp_path, [2]) == 0
    run_until_empty(tmp_path)
    assert set(dead(tmp_path)) == {1, 4, 6, 7}
    assert_balanced(tmp_path)


def test_a_replay_can_be_requested_while_a_delivery_runs(tmp_path: Path, server: EventsServer) -> None:
    with_dead_letters(tmp_path, server, {3})
    server.script = lambda _: Answer()
    with delivering(tmp_path):
        replay_dead_letters(tmp_path)
        eventually(lambda: dead(tmp_path) == {}, what="the replay")
        eventually(lambda: delivered(tmp_path) == 10)


def test_a_replay_waits_for_an_endpoint_that_is_down_and_ignores_the_age_limit(
    tmp_path: Path, server: EventsServer
) -> None:
    with_dead_letters(tmp_path, server, {3})
    server.script = lambda _: Answer(500) if len(server.posts) % 3 else Answer()
    replay_dead_letters(tmp_path)
    run_until_empty(tmp_path, max_age=timedelta(seconds=0))
    assert dead(tmp_path) == {}


def test_a_spool_without_books_has_nothing_to_replay(tmp_path: Path) -> None:
    assert replay_dead_letters(tmp_path) == 0
    assert replay_quarantine(tmp_path, {"ingest_endpoint": "http://127.0.0.1:9/events"}) == QuarantineReplay()


# Redelivery


@pytest.mark.parametrize(
    ("since", "until"),
    [
        ("2026-11-22T07:00:00", END),
        (BEGINNING, "tomorrow"),
        ("", END),
        (END, BEGINNING),
        (BEGINNING, BEGINNING),
        ("2026-13-01T00:00:00Z", END),
        (datetime(2026, 1, 1), END),  # noqa: DTZ001 - the missing time zone is the error
        ("0001-01-01T00:00:00+23:00", END),
    ],
)
def test_an_invalid_span_is_refused(tmp_path: Path, since: str | datetime, until: str | datetime) -> None:
    with pytest.raises(ValueError, match=r"since|until"):
        request_redelivery(tmp_path, since, until)
    with pytest.raises(ValueError, match="subject"):
        request_redelivery(tmp_path, BEGINNING, END, "")


def spans(spool: Path) -> list[Any]:
    with closing(sqlite3.connect(spool / FILE)) as db:
        return db.execute("SELECT since, until, subject FROM redeliveries ORDER BY id").fetchall()


def test_a_span_is_stored_in_the_format_of_event_times(tmp_path: Path) -> None:
    east = timezone(timedelta(hours=2))
    until = datetime(2026, 11, 22, 10, tzinfo=east)
    assert request_redelivery(tmp_path, "2026-11-22T09:00:00.500+02:00", until, "bob") == 1
    assert request_redelivery(tmp_path, BEGINNING, until) == 2
    assert spans(tmp_path) == [
        ("2026-11-22T07:00:00.500Z", "2026-11-22T08:00:00.000Z", "bob"),
        ("2000-01-01T00:00:00.000Z", "2026-11-22T08:00:00.000Z", None),
    ]


def test_retained_events_of_a_span_and_a_subject_are_redelivered(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=4))
    for n in range(24):
        spooled(
            tmp_path,
            [record(n, subject=("alice", "bob")[n % 2], time=f"2026-11-22T{n:02d}:30:00.000Z")],
        )
    run_until_empty(tmp_path)
    request_redelivery(tmp_path, "2026-11-22T04:30:00Z", "2026-11-22T20:30:00Z", "bob")
    posts = len(server.posts)
    run_until_empty(tmp_path)
    again = {event_id for event_id, came in server.came.items() if came == 2}
    assert sorted(again) == [f"event-{n:06d}" for n in range(5, 21, 2)]
    assert max(len(post.ids) for post in server.posts[posts:]) <= 4
    assert count(tmp_path, "redelivered") == 8
    run_until_empty(tmp_path)
    assert set(server.came.values()) == {1, 2}
    assert_balanced(tmp_path)


def test_refused_and_resent_events_are_not_redelivered(tmp_path: Path, server: EventsServer) -> None:
    server.script = rejects({"event-000001"})
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0), record(0), record(1), record(2)])
    run_until_empty(tmp_path)
    request_redelivery(tmp_path, BEGINNING, END)
    run_until_empty(tmp_path)
    assert all(post.ids.count("event-000000") <= 1 for post in server.posts)
    assert count(tmp_path, "redelivered") == 2
    assert list(dead(tmp_path).values()) == ["event-000001"]
    assert_balanced(tmp_path)


def test_a_dead_endpoint_delays_no_redelivery_to_another(tmp_path: Path) -> None:
    with serving() as good, serving() as bad:
        for queue, url in (("0-bad", bad.url), ("1-good", good.url)):
            write_destination(tmp_path, destination(url, id=queue))
            spooled(tmp_path, [record(1)], queue)
        run_until_empty(tmp_path)
        bad.script = lambda _: Answer(500)
        request_redelivery(tmp_path, BEGINNING, END)
        request_redelivery(tmp_path, BEGINNING, END)
        with delivering(tmp_path):
            eventually(lambda: good.came["event-000001"] == 3, what="both redeliveries")
            assert bad.came["event-000001"] == 1
            bad.script = lambda _: Answer()
            eventually(lambda: bad.came["event-000001"] == 3, what="both redeliveries")


@contextmanager
def delivery_process(spool: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "openmeter_plugin", "deliver", "--spool", str(spool)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def test_a_killed_redelivery_resumes_where_it_was(tmp_path: Path) -> None:
    half, go_on = threading.Event(), threading.Event()

    def script(post: Post) -> Answer:
        if "event-000010" in post.ids and redelivering.is_set() and not go_on.is_set():
            half.set()
            go_on.wait(20)
        return Answer()

    redelivering = threading.Event()
    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(20)], each_alone=True)
        run_until_empty(tmp_path)
        redelivering.set()
        request_redelivery(tmp_path, BEGINNING, END)
        with delivery_process(tmp_path) as process:
            assert half.wait(20)
            process.send_signal(signal.SIGKILL)
        go_on.set()
        assert count(tmp_path, "redelivered") == 10
        run_until_empty(tmp_path)
    assert count(tmp_path, "redelivered") == 20
    again = Counter(server.came.values())
    assert {n: server.came[f"event-{n:06d}"] for n in range(10)} == dict.fromkeys(range(10), 2)
    assert again[1] == 0


def test_an_answer_that_many_dead_letters_have_is_stored_once(tmp_path: Path, server: EventsServer) -> None:
    reason = "the schema says no. " * 90
    server.script = lambda _: refusal(400, reason, instance=f"urn:request:{len(server.posts)}")
    write_destination(tmp_path, destination(server.url))
    permit(tmp_path, QUEUE)
    spooled(tmp_path, [record(n) for n in range(2000)])
    run_until_empty(tmp_path, seconds=60)
    letters = [letter for *_, letter in read_dead_letters(tmp_path)]
    assert len(letters) == 2000
    assert all(reason.strip() in letter.answer for letter in letters)
    size = sum(path.stat().st_size for path in tmp_path.glob("books.db*"))
    assert size / 2000 < 1000, "each event takes some 200 bytes; with its answer it took 2,000 more"
    server.script = lambda _: Answer()
    replay_dead_letters(tmp_path)
    run_until_empty(tmp_path, seconds=60)
    with reading(tmp_path) as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (0,)


def test_names_and_answers_of_others_steer_no_terminal(tmp_path: Path, server: EventsServer) -> None:
    server.script = lambda _: refusal(400, "red \x1b[31m \x9b31m \u202e txet")
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(1, subject="consumer:\x1b]0;owned\x07\x9b1m\u202eecila")])
    run_until_empty(tmp_path)
    for command in (["dead-letters"], ["dead-letters", "--output=json"], ["export", "--dead-letters"]):
        shown = run(*command, str(tmp_path)).stdout
        assert "ecila" in shown
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]
