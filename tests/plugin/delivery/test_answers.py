"""Answers of the server: a batch is retried until it is delivered, and invalid events become dead letters."""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.delivery.answers import (
    DeliveryError,
    RejectedError,
    UnauthorizedError,
    UndeliveredError,
)
from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import encode_events
from tests.harness.books import read_dead_letters
from tests.harness.ports import free_port
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    count,
    delivered,
    delivering,
    event,
    fails_first,
    ids,
    post_once,
    record,
    rejects,
    run_until_empty,
    spooled,
)
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import destination

pytestmark = pytest.mark.slow

# Retries


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405, 408, 429, 500, 502, 503])
def test_a_batch_is_retried_until_the_server_accepts_it(tmp_path: Path, status: int) -> None:
    with serving(EventsServer(fails_first(3, Answer(status)))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        run_until_empty(tmp_path)
    assert [post.ids for post in server.posts] == [ids(range(10))] * 4
    assert server.taken == ids(range(10))
    assert set(server.came.values()) == {1}
    assert read_dead_letters(tmp_path) == []


def test_a_batch_that_was_stored_but_not_answered_is_retried_and_counts_once(tmp_path: Path) -> None:
    script = fails_first(3, Answer(cut=True, taken=10), Answer(cut=True), Answer(500, taken=4))
    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        run_until_empty(tmp_path)
    assert server.taken == ids(range(10))
    assert len(server.posts) == 4
    assert count(tmp_path, "delivered") == 10


def test_a_truncated_answer_counts_as_none(tmp_path: Path) -> None:
    short = Answer(200, "{", {"content-length": "500"})
    with serving(EventsServer(fails_first(1, short))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
    assert len(server.posts) == 2
    assert delivered(tmp_path) == 1


def test_a_post_without_an_answer_times_out_and_is_retried(tmp_path: Path) -> None:
    hang = threading.Event()

    def script(post: Post) -> Answer:
        if len(running.posts) == 1:
            hang.wait(20)
        return Answer()

    running = EventsServer(script)
    with serving(running) as server:
        write_destination(tmp_path, destination(server.url, timeout=0.2))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
        hang.set()
    assert len(server.posts) == 2
    assert delivered(tmp_path) == 1


def test_a_server_that_is_down_gets_everything_once_it_is_up(tmp_path: Path, lines: list[Any]) -> None:
    port = free_port()
    write_destination(tmp_path, destination(f"http://127.0.0.1:{port}/api/v1/events"))
    spooled(tmp_path, [record(n) for n in range(100)])
    with delivering(tmp_path):
        eventually(lambda: [line for line in lines if line["event"] == "delivery_failed"])
        assert delivered(tmp_path) == 0
        with serving(port=port) as server:
            eventually(lambda: delivered(tmp_path) == 100)
    assert server.taken == ids(range(100))


def test_no_retry_happens_before_the_time_in_retry_after(tmp_path: Path) -> None:
    with serving(EventsServer(fails_first(1, Answer(429, headers={"retry-after": "1"})))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
    first, second = server.posts
    assert second.at - first.at >= 1


def test_the_pause_between_retries_grows_up_to_a_bound(tmp_path: Path) -> None:
    with serving(EventsServer(fails_first(8, Answer(500)))) as server:
        write_destination(tmp_path, destination(server.url, initial_retry_delay=0.02, max_retry_delay=0.2))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
    pauses = [b.at - a.at for a, b in zip(server.posts, server.posts[1:], strict=False)]
    assert len(pauses) == 8
    assert min(pauses[4:]) >= 0.1
    assert pauses[0] < 0.1
    assert sorted(pauses)[4] < 1  # a busy machine may stretch a few


def answered(answer: Answer) -> DeliveryError | None:
    """Return the error of one POST to a server with this answer."""
    with serving(EventsServer(lambda _: answer)) as server:
        return post_once(server.url)


def in_seconds(seconds: float) -> Callable[[], str]:
    return lambda: email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        (" 12 ", 12, 12),
        ("999999999999999", 3600, 3600),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("1.5", 0, 0),
        ("\N{SUPERSCRIPT TWO}", 0, 0),
        (in_seconds(100), 95, 101),
        (in_seconds(-100), 0, 0),
        (in_seconds(10**6), 3600, 3600),
        ("Wed, 99 Foo 2026 99:99:99 GMT", 0, 0),
        ("", 0, 0),
    ],
)
def test_retry_after_is_parsed_in_both_forms_and_bounded(
    value: str | Callable[[], str], least: float, most: float
) -> None:
    text = value if isinstance(value, str) else value()
    error = answered(Answer(503, headers={"retry-after": text}))
    assert isinstance(error, UndeliveredError)
    assert least <= error.retry_after <= most


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, RejectedError), (413, RejectedError), (422, RejectedError)),
        *((401, UnauthorizedError), (403, UnauthorizedError)),
        *((404, UndeliveredError), (429, UndeliveredError), (500, UndeliveredError)),
    ],
)
def test_the_status_decides_what_happens_to_the_batch(status: int, kind: type[Exception]) -> None:
    error = answered(refusal(status, "the reason"))
    assert type(error) is kind
    assert "the reason" in str(error)
    assert getattr(error, "status", None) == status


def test_a_long_answer_is_truncated() -> None:
    assert len(str(answered(refusal(400, "x" * 100_000)))) <= 2000


# Refused events


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("bad", [{0}, {9}, {4}, {3, 4}, {0, 5, 9}, set(range(10))], ids=str)
def test_exactly_the_bad_events_become_dead_letters_and_the_rest_is_delivered(
    tmp_path: Path, bad: set[int], status: int
) -> None:
    wrong = {f"event-{n:06d}" for n in bad}
    with serving(EventsServer(rejects(wrong, status))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(12)])
        run_until_empty(tmp_path)
    letters = [letter for *_, letter in read_dead_letters(tmp_path)]
    assert [letter.event for letter in letters] == [event(n) for n in sorted(bad)]
    for letter, n in zip(letters, sorted(bad), strict=True):
        assert f"event-{n:06d} is bad" in letter.answer
    assert {letter.status for letter in letters} == {status}
    assert sorted(server.taken) == sorted(set(ids(range(12))) - wrong)
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (12 - len(bad), len(bad))
    assert count(tmp_path, "events") == 12


def test_a_bad_event_among_those_of_one_request_is_found(tmp_path: Path) -> None:
    with serving(EventsServer(rejects({"event-000001"}))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(0, 1, 2)])
        run_until_empty(tmp_path)
    assert [letter.event for *_, letter in read_dead_letters(tmp_path)] == [event(1)]
    assert sorted(server.taken) == ["event-000000", "event-000002"]


def test_a_batch_that_is_too_large_for_the_server_is_split(tmp_path: Path) -> None:
    def script(post: Post) -> Answer:
        return refusal(413, "too large") if len(post.body) > 2500 else Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        records = [encode_events([event(n, pad="x" * (3000 if n == 7 else 300))]) for n in range(20)]
        spooled(tmp_path, records)
        run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(7), range(8, 20))
    assert [letter.event for *_, letter in read_dead_letters(tmp_path)] == [event(7, pad="x" * 3000)]


def test_a_server_that_fails_during_the_search_for_the_bad_event_costs_nothing(tmp_path: Path) -> None:
    reject = rejects({"event-000005"})
    trouble = [Answer(500), Answer(cut=True, taken=0), Answer(401)] * 5

    def script(post: Post) -> Answer:
        return trouble.pop() if trouble and len(running.posts) % 2 else reject(post)

    running = EventsServer(script)
    with serving(running) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(5), range(6, 10))
    assert [letter.event for *_, letter in read_dead_letters(tmp_path)] == [event(5)]
