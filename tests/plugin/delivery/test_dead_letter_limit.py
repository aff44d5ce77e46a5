"""Limits of dead letters: while nearly everything is refused, or the disk is nearly full, a queue is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.replay import replay_dead_letters
from openmeter_plugin.delivery.dead_letters import ENOUGH, PERMISSION, DeadLetterLimit
from openmeter_plugin.spool.destination import queues_directory, write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import QUEUE, destination, small_file_system


def held(lines: list[Any], why: str) -> Callable[[], list[Any]]:
    return lambda: [line for line in lines if line["event"] == "delivery_held" and line["hold"] == why]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "letters"), [(20, ENOUGH), (1, ENOUGH), (500, 0)])
def test_a_queue_of_which_everything_is_refused_waits_and_goes_on_by_itself(
    tmp_path: Path, lines: list[Any], batch: int, letters: int
) -> None:
    with serving(EventsServer(lambda _: refusal())) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=batch))
        spooled(tmp_path, [record(n) for n in range(300)])
        with delivering(tmp_path):
            eventually(held(lines, "refusals"), what="the alarm")
            posts = len(server.posts)
            eventually(lambda: len(server.posts) > posts + 5, what="more attempts")
            assert count(tmp_path, "dead_lettered") == letters
            assert waiting(tmp_path) == 300 - letters
            server.script = lambda _: Answer()
            eventually(lambda: delivered(tmp_path) == 300 - letters, what="the delivery of the rest")
            replay_dead_letters(tmp_path)
            eventually(lambda: delivered(tmp_path) == 300, what="the replay")
    assert sorted(server.taken) == ids(range(300))
    assert [line for line in lines if line["event"] == "delivery_recovered"]
    assert_balanced(tmp_path)


@pytest.mark.slow
def test_after_a_restart_nothing_of_a_held_queue_is_lost(tmp_path: Path, lines: list[Any]) -> None:
    with serving(EventsServer(lambda _: refusal())) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(250)])
        with delivering(tmp_path):
            eventually(held(lines, "refusals"), what="the alarm")
        server.script = lambda _: Answer()
        run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(250))
    assert read_dead_letters(tmp_path) == []


@pytest.mark.slow
def test_an_operator_may_have_all_refused_events_become_dead_letters(
    tmp_path: Path, lines: list[Any]
) -> None:
    bad = set(ids(range(250)))

    def script(post: Post) -> Answer:
        return refusal() if bad & set(post.ids) else Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=25))
        spooled(tmp_path, [record(n) for n in range(400)])
        with delivering(tmp_path):
            eventually(held(lines, "refusals"), what="the alarm")
            permission = queues_directory(tmp_path) / QUEUE / PERMISSION
            permission.touch()
            eventually(lambda: delivered(tmp_path) == 150, what="the delivery of the others")
            eventually(lambda: not permission.exists(), what="the end of the permission")
    assert len(read_dead_letters(tmp_path)) == 250
    assert_balanced(tmp_path)


@pytest.mark.slow
def test_a_replay_that_is_refused_again_holds_no_queue(tmp_path: Path, lines: list[Any]) -> None:
    with serving(EventsServer(lambda _: refusal())) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=20))
        queue = queues_directory(tmp_path) / QUEUE
        spooled(tmp_path, [record(n) for n in range(150)])
        (queue / PERMISSION).touch()
        run_until_empty(tmp_path)
        (queue / PERMISSION).unlink()
        replay_dead_letters(tmp_path)
        run_until_empty(tmp_path)
    assert held(lines, "refusals")() == []
    assert count(tmp_path, "dead_lettered") == 150


def test_single_invalid_events_among_accepted_ones_hold_nothing(tmp_path: Path) -> None:
    limit = DeadLetterLimit(tmp_path, QUEUE)
    for _ in range(10_000):
        limit.refused()
        limit.accepted(1)
        assert limit.hinders() is None


def test_nearly_everything_is_enough(tmp_path: Path) -> None:
    limit = DeadLetterLimit(tmp_path, QUEUE)
    refused = 0
    while limit.hinders() is None and refused < 1000:
        if refused % 20 == 0:
            limit.accepted(1)
        limit.refused()
        refused += 1
    assert refused == ENOUGH


def test_a_long_good_history_does_not_hide_that_everything_is_refused_now(tmp_path: Path) -> None:
    limit = DeadLetterLimit(tmp_path, QUEUE)
    for _ in range(1000):
        limit.accepted(500)
    refused = 0
    while limit.hinders() is None and refused < 100_000:
        limit.refused()
        refused += 1
    assert refused < 5000


@pytest.mark.slow
def test_dead_letters_leave_the_disk_to_usage_and_books(tmp_path: Path, lines: list[Any]) -> None:
    bad = {"event-000003"}

    def script(post: Post) -> Answer:
        return refusal() if bad & set(post.ids) else Answer()

    with small_file_system(tmp_path / "spool", "48m") as spool, serving(EventsServer(script)) as server:
        write_destination(spool, destination(server.url))
        spooled(spool, [record(n) for n in range(10)])
        ballast = spool / "ballast"
        ballast.write_bytes(bytes(38 * 1024 * 1024))
        with delivering(spool):
            eventually(held(lines, "disk"), what="the alarm")
            assert read_dead_letters(spool) == []
            assert waiting(spool) == 10
            ballast.unlink()
            eventually(lambda: count(spool, "dead_lettered") == 1, what="the dead letter")
            eventually(lambda: delivered(spool) == 9, what="the delivery")
        assert_balanced(spool)
