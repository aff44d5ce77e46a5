"""Delivery from real files to a real HTTP server: every event arrives exactly once in effect."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from openmeter_plugin.delivery import pipeline as pipeline_module
from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import encode_events
from openmeter_plugin.spool.writer import SpoolWriter
from syncd.sandbox.testing import running_sandbox
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import count, delivered, delivering, event, ids, record, run_until_empty, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, serving, take_all
from tests.plugin.spools import QUEUE, destination, running_writer

pytestmark = pytest.mark.slow

TOKEN = "token-of-the-delivery-tests"


# Requests


@pytest.mark.parametrize("status", [200, 202, 204])
def test_every_event_arrives_whichever_2xx_status_the_api_answers(tmp_path: Path, status: int) -> None:
    with serving(EventsServer(lambda _: Answer(status))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(50)])
        run_until_empty(tmp_path)
    assert server.taken == ids(range(50))
    assert set(server.came.values()) == {1}
    assert delivered(tmp_path) == 50


def test_a_batch_is_a_json_list_with_the_exact_content_type_and_the_token(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, token=TOKEN))
    spooled(tmp_path, [record(1), record(2, 3)])
    run_until_empty(tmp_path)
    (post,) = server.posts
    assert post.path == "/api/v1/events"
    assert post.headers["content-type"] == "application/cloudevents-batch+json"
    assert post.headers["authorization"] == f"Bearer {TOKEN}"
    assert [orjson.dumps(e) for e in post.events] == [event(1), event(2), event(3)]


def test_without_a_token_no_authorization_is_sent(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(1)])
    run_until_empty(tmp_path)
    assert "authorization" not in server.posts[0].headers


def test_no_batch_has_more_events_than_its_limit(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=10))
    spooled(tmp_path, [record(3 * n, 3 * n + 1, 3 * n + 2) for n in range(20)])
    run_until_empty(tmp_path)
    assert [len(post.ids) for post in server.posts] == [9] * 6 + [6]
    assert server.taken == ids(range(60))


def test_a_request_with_more_events_than_the_limit_is_sent_anyway(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=1))
    spooled(tmp_path, [record(0, 1, 2), record(3), record(4, 5)])
    run_until_empty(tmp_path)
    assert [post.ids for post in server.posts] == [ids(range(3)), ids(range(3, 4)), ids(range(4, 6))]


def test_no_batch_has_more_bytes_than_its_limit(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "MAX_BATCH_BYTES", 10_000)
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [encode_events([event(n, pad="x" * 1000)]) for n in range(40)])
    run_until_empty(tmp_path)
    assert len(server.posts) >= 5
    assert max(len(post.body) for post in server.posts) < 10_100
    assert server.taken == ids(range(40))


def test_events_within_the_coalescing_delay_share_a_batch_up_to_its_limit(
    tmp_path: Path, server: EventsServer
) -> None:
    described = destination(server.url, max_coalescing_delay=60, max_batch_size=20)
    write_destination(tmp_path, described)
    with running_writer(tmp_path) as writer, delivering(tmp_path):
        queue = writer.queue(QUEUE)
        for n in range(0, 20, 2):
            writer.append(queue, record(n, n + 1), None)
            writer._syncer._stopped.wait(0.01)  # they arrive one by one
        eventually(lambda: len(server.taken) == 20)
    assert [post.ids for post in server.posts] == [ids(range(20))]


def test_a_batch_that_is_not_full_is_sent_after_the_coalescing_delay(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_coalescing_delay=0.1))
    spooled(tmp_path, [record(1)])
    with delivering(tmp_path):
        eventually(lambda: server.taken == ids(range(1, 2)), seconds=5)


def test_a_coalesced_batch_keeps_to_its_limit_when_a_request_has_several_events(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_coalescing_delay=0.3, max_batch_size=4))
    with running_writer(tmp_path) as writer, delivering(tmp_path):
        queue = writer.queue(QUEUE)
        for n in range(0, 12, 3):
            writer.append(queue, record(n, n + 1, n + 2), None)
            writer._syncer._stopped.wait(0.06)
        eventually(lambda: len(server.taken) == 12)
    assert {len(post.ids) for post in server.posts} == {3}


# The sandbox


def test_the_sandbox_has_every_event_once_after_all_kinds_of_faults(tmp_path: Path) -> None:
    with (
        running_sandbox(token=TOKEN) as url,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}) as api,
    ):
        faults: list[dict[str, object]] = [
            {"path": "/api/v1/events", "status": 500, "count": 2},
            {"path": "/api/v1/events", "action": "accept_then_cut", "count": 2},
            {"path": "/api/v1/events", "status": 429, "retry_after": 0, "count": 1},
            {"event_id": "event-000123", "status": 400},
        ]
        for fault in faults:
            assert api.post("/sandbox/v1/faults", json=fault).is_success
        write_destination(tmp_path, destination(f"{url}/api/v1/events", token=TOKEN, max_batch_size=100))
        spooled(tmp_path, [record(n) for n in range(1000)])
        run_until_empty(tmp_path)
        stats = api.get("/sandbox/v1/stats").json()
    assert stats["events_stored"] == 999
    assert [json.loads(letter.event)["id"] for *_, letter in read_dead_letters(tmp_path)] == ["event-000123"]
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (999, 1)


def test_events_written_and_delivered_at_the_same_time_are_in_the_sandbox_once_each(tmp_path: Path) -> None:
    with (
        running_sandbox(token=TOKEN) as url,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}) as api,
    ):
        described = destination(f"{url}/api/v1/events", token=TOKEN)
        options: dict[str, Any] = {"segment_bytes": 20_000, "fsync_interval": 0.02}
        with delivering(tmp_path), running_writer(tmp_path, **options) as writer:
            queue = writer.describe(described)
            hand_over_from_threads(writer, queue, 2000)
            eventually(lambda: delivered(tmp_path) == 2000, what="the delivery of all")
        stats = api.get("/sandbox/v1/stats").json()
    assert (stats["events_stored"], count(tmp_path, "events")) == (2000, 2000)


def hand_over_from_threads(writer: SpoolWriter, queue: Any, number: int) -> None:
    def some(start: int) -> None:
        for n in range(start, number, 4):
            writer.append(queue, record(n), None)

    threads = [threading.Thread(target=some, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_by_default_the_test_server_accepts_everything() -> None:
    assert take_all(Post("/", {}, b"[]", 0.0)) == Answer(204)
