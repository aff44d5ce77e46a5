"""One process delivers a spool: also if its lock is removed, and whatever the disk refuses for a moment."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.books.store import Books, BooksTakenError
from openmeter_plugin.delivery import process
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.spool.destination import DELIVERY_LOCK, queues_directory, write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import assert_balanced, count, delivered, delivering, ids, record, spooled
from tests.plugin.events_server import EventsServer
from tests.plugin.spools import QUEUE, destination


def test_only_the_last_one_to_open_the_books_may_write_them(tmp_path: Path) -> None:
    with closing(Books(tmp_path)) as first, closing(Books(tmp_path)) as second:
        second.count("q", "redelivered")
        with pytest.raises(BooksTakenError):
            first.count("q", "redelivered")
    assert count(tmp_path, "redelivered", queue="q") == 1


def test_a_lock_file_that_was_replaced_while_it_was_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = process._locked
    replaced: list[bool] = []

    def slow(descriptor: int) -> bool:
        held = locked(descriptor)
        if not replaced:
            (tmp_path / DELIVERY_LOCK).unlink()
            (tmp_path / DELIVERY_LOCK).touch()
            replaced.append(True)
        return held

    monkeypatch.setattr(process, "_locked", slow)
    descriptor = asyncio.run(asyncio.wait_for(process._lock(tmp_path), 10))
    try:
        assert os.path.samestat(os.fstat(descriptor), (tmp_path / DELIVERY_LOCK).stat())
    finally:
        os.close(descriptor)


def test_a_stop_while_the_books_are_opened_keeps_the_lock_until_they_are_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    free_meanwhile: list[bool] = []

    def slow(spool: Path) -> Books:
        opening.set()
        assert go_on.wait(10)
        with (spool / DELIVERY_LOCK).open("r+b") as other:
            free_meanwhile.append(process._locked(other.fileno()))
        return Books(spool)

    async def stop() -> None:
        delivery = asyncio.ensure_future(process.deliver(DeliveryOptions(tmp_path)))
        await asyncio.to_thread(opening.wait, 10)
        delivery.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await delivery

    monkeypatch.setattr(process, "Books", slow)
    asyncio.run(stop())
    assert free_meanwhile == [False]


@pytest.mark.slow
def test_a_lock_removed_under_a_running_server_lets_no_second_one_count_beside_it(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=10))
    with structlog.testing.capture_logs() as lines, delivering(tmp_path):
        spooled(tmp_path, [record(n) for n in range(100)])
        eventually(lambda: delivered(tmp_path) == 100, what="the first hundred")
        (tmp_path / DELIVERY_LOCK).unlink()
        with delivering(tmp_path):
            for start in range(100, 400, 100):
                spooled(tmp_path, [record(n) for n in range(start, start + 100)])
            eventually(lambda: delivered(tmp_path) >= 400, what="the delivery of the rest")
            eventually(
                lambda: [line for line in lines if line["event"] == "delivery_interrupted"],
                what="the end of one of them",
            )
    assert (count(tmp_path, "events"), delivered(tmp_path)) == (400, 400)
    assert set(server.taken) == set(ids(range(400)))
    assert_balanced(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES], ids=["files", "I/O", "access"])
def test_a_directory_that_cannot_be_listed_for_a_moment_ends_nothing(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_destination(tmp_path, destination(server.url))
    listdir, left = os.listdir, [60]

    def failing(path: Any = ".") -> Any:
        if str(path).startswith(str(queues_directory(tmp_path))) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return listdir(path)

    with delivering(tmp_path):
        spooled(tmp_path, [record(n) for n in range(10)])
        eventually(lambda: delivered(tmp_path) == 10, what="the first delivery")
        monkeypatch.setattr(os, "listdir", failing)
        spooled(tmp_path, [record(n) for n in range(10, 20)])
        # Records that are appended to a known segment need no list; the next look for queues does.
        eventually(lambda: left[0] == 0 and delivered(tmp_path) == 20, what="the delivery after the failures")
    assert server.taken == ids(range(20))
    assert queues_directory(tmp_path).joinpath(QUEUE).is_dir()
