"""kill -9 of the delivery process, a full disk, damaged books: nothing is lost, and both equations hold."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.process import deliver
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_counts, read_dead_letters
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import eventually, plugin_server
from tests.harness.recordings import Recorded, serialized
from tests.plugin.deliveries import (
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    run_until_empty,
    skip,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import QUEUE, destination, running_writer, small_file_system

pytestmark = pytest.mark.slow

BAD = {f"event-{n:06d}" for n in range(0, 5000, 97)}


def moody(rng: random.Random) -> Any:
    """Refuse the bad events, and sometimes fail as metering APIs do."""

    def script(post: Post) -> Answer:
        good = next((n for n, event_id in enumerate(post.ids) if event_id in BAD), len(post.ids))
        mood = rng.random()
        if mood < 0.1:
            return Answer(cut=True, taken=rng.randrange(good + 1))
        if mood < 0.2:
            return Answer(500, taken=rng.randrange(good + 1))
        return Answer() if good == len(post.ids) else replace(refusal(400, "bad"), taken=good)

    return script


@pytest.mark.parametrize("seed", range(2))
def test_the_books_hold_after_kill_9_at_any_moment_and_everything_arrives(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    command = [sys.executable, "-m", "openmeter_plugin", "deliver", "--retention", "0s", "--spool"]
    number = 0
    with (
        serving(EventsServer(moody(rng))) as server,
        running_writer(tmp_path, segment_bytes=20_000, fsync_interval=0.02) as writer,
    ):
        described = destination(server.url, max_batch_size=25, max_coalescing_delay=0.01)
        # One POST at a time, and several.
        write_destination(tmp_path, replace(described, concurrency=1 + 3 * (seed % 2)))
        queue = writer.queue(QUEUE)
        for _ in range(4):
            posts = len(server.posts) + rng.randrange(1, 12)
            process = subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.DEVNULL)
            try:
                while len(server.posts) < posts or rng.random() < 0.9:
                    for _ in range(rng.randrange(4)):
                        writer.append(queue, record(number, number + 1), None)
                        number += 2
                    again = number and rng.random() < 0.5
                    writer.append(queue, record(number - 2, number - 1) if again else skip(), None)
                    time.sleep(0.002)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait(20)
            assert_balanced(tmp_path)
    with serving(server, port=int(server.url.rpartition(":")[2].partition("/")[0])):
        run_until_empty(tmp_path, seconds=60)
    assert_balanced(tmp_path)
    assert waiting(tmp_path) == 0
    refused = {event_id for event_id in ids(range(number)) if event_id in BAD}
    assert {orjson.loads(letter.event)["id"] for *_, letter in read_dead_letters(tmp_path)} == refused
    assert set(server.taken) == set(ids(range(number))) - refused
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (number - len(refused), len(refused))


def test_books_that_turn_out_damaged_end_the_process_and_the_next_start_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(5)])
        run_until_empty(tmp_path)

        def malformed(*_: Any) -> None:
            raise sqlite3.DatabaseError("database disk image is malformed")

        spooled(tmp_path, [record(5)])
        for name in ("account", "deliver"):
            with monkeypatch.context() as patch:
                patch.setattr(Books, name, malformed)
                with pytest.raises(BaseException, match=r"malformed|TaskGroup") as caught:
                    asyncio.run(asyncio.wait_for(deliver(DeliveryOptions(tmp_path)), 20))
                assert not isinstance(caught.value, TimeoutError)
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[:4096] + b"\xa5" * 8192)
        run_until_empty(tmp_path)
    assert server.taken == ids(range(6))
    assert count(tmp_path, "events") == delivered(tmp_path) == 6
    assert_balanced(tmp_path)


def test_the_journal_of_damaged_books_is_renamed_with_them(tmp_path: Path) -> None:
    Books(tmp_path).close()
    books = Books(tmp_path)
    books.count("q", "redelivered", 5)
    copies = {name: (tmp_path / name).read_bytes() for name in (FILE, f"{FILE}-wal")}
    books.close()
    assert len(copies[f"{FILE}-wal"]) > 0
    for name, content in copies.items():  # the state after kill -9
        (tmp_path / name).write_bytes(content)
    (tmp_path / FILE).write_bytes(b"\xa5" * 8192)
    Books(tmp_path).close()
    assert read_counts(tmp_path) == {}
    assert len(list(tmp_path.glob(f"{FILE}.damaged-*-wal"))) == 1


def test_delivery_waits_for_books_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(5)])
        with structlog.testing.capture_logs() as lines, delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "books_open_failed"])
            (tmp_path / FILE).rmdir()
            eventually(lambda: (tmp_path / FILE).is_file() and delivered(tmp_path) == 5)
    assert server.taken == ids(range(5))


def test_nothing_is_counted_or_sent_until_the_books_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    tried = []

    def limited(entry: Any) -> Any:
        def method(self: Books, *arguments: Any) -> None:
            if full[0]:
                tried.append(entry.__name__)
                raise sqlite3.OperationalError("database or disk is full")
            entry(self, *arguments)

        return method

    for name in ("account", "deliver", "forget", "replayed"):
        monkeypatch.setattr(Books, name, limited(getattr(Books, name)))
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        with delivering(tmp_path):
            spooled(tmp_path, [record(n) for n in range(50)] + [skip(), record(7)])
            eventually(lambda: len(tried) > 5, what="many retries")
            assert (read_counts(tmp_path), server.posts) == ({}, [])
            full[0] = False
            eventually(lambda: delivered(tmp_path) == 50)
    assert (count(tmp_path, "requests"), count(tmp_path, "resent")) == (52, 1)
    assert set(server.came.values()) == {1}
    assert_balanced(tmp_path)


def requests(plugin: PluginInstance, number: int) -> Iterator[tuple[PluginInstance, Recorded, str]]:
    template = serialized("authenticated").log
    original = serialized("authenticated").parsed["request"]["id"].encode()
    for n in range(number):
        request_id = f"event-{n:06d}"
        yield plugin, Recorded(request_id, template.replace(original, request_id.encode())), request_id


async def driven(socket: Path, plugin: PluginInstance, number: int) -> KongWorker:
    worker = KongWorker(socket)
    await drive(worker, requests(plugin, number), concurrency=32)
    await worker.close()
    return worker


def test_a_full_disk_never_delays_kong_and_everything_arrives_once_there_is_room(tmp_path: Path) -> None:
    number = 8000
    with (
        small_file_system(tmp_path / "spool", "3m") as spool,
        serving(EventsServer(lambda _: Answer(503))) as server,
        plugin_server(tmp_path, "--retention-size", "100MiB") as plugin,
    ):
        config: dict[str, object] = {"ingest_endpoint": server.url, "queue": {"max_retry_delay": 0.2}}
        worker = asyncio.run(driven(plugin.socket, PluginInstance(config), number))
        assert len(worker.tally.acknowledged) == number
        assert worker.tally.lost == []
        assert "spool_write_failed" in plugin.log_text()
        children = set(plugin.children())
        server.script = lambda _: Answer()
        (queue,) = (path.name for path in (spool / "queues").iterdir())

        def settled() -> bool:
            lost = count(spool, "lost", "disk", queue)
            return delivered(spool, queue) + lost == number

        eventually(settled, what="the delivery of all", seconds=30)
        assert set(plugin.children()) == children, "nothing crashed"
        assert_balanced(spool)
        assert len(server.taken) == delivered(spool, queue) == number
        plugin.stop()
        assert "process_crashed" not in plugin.log_text()
