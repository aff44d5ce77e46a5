"""`openmeter-plugin serve --segments` as real processes, up to the metering API."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.books import total_counts
from tests.harness.kong_segments import Worker, configuration, encode_head, request_line, write_segment
from tests.harness.process import PluginServer, eventually, plugin_server

pytestmark = pytest.mark.slow

TOKEN = "token-of-this-test"


@pytest.fixture
def sandbox() -> Iterator[str]:
    with running_sandbox(token=TOKEN) as url:
        yield url


def configured(sandbox: str, **members: object) -> bytes:
    queue = {"max_coalescing_delay": 0.05}
    return configuration(f"{sandbox}/api/v1/events", api_token=TOKEN, queue=queue, **members)


def stored(sandbox: str) -> int:
    """Return how many events the metering API has, each id once."""
    answer = httpx.get(
        f"{sandbox}/sandbox/v1/stats", headers={"authorization": f"Bearer {TOKEN}"}, verify=False
    )
    return int(answer.json()["events_stored"])


def reader_of(server: PluginServer) -> int:
    return eventually(lambda: server.child("segments") or 0, what="the reader's start")


def test_a_request_that_kong_writes_is_billed_within_a_second(tmp_path: Path, sandbox: str) -> None:
    folder = tmp_path / "segments"
    with plugin_server(tmp_path, "--segments", str(folder)):
        eventually((folder / "instances").is_dir, what="the folder")
        worker = Worker(folder)
        worker.write(request_line(worker.configure(configured(sandbox)), "r1"))
        eventually(lambda: stored(sandbox) == 1, what="the arrival")


def test_readers_killed_at_random_bill_each_request_once(tmp_path: Path, sandbox: str) -> None:
    folder = tmp_path / "segments"
    chance = random.Random(14)
    number = 0
    with plugin_server(tmp_path, "--segments", str(folder), "--api", f"unix:{tmp_path / 'api'}") as server:
        workers = [Worker(folder) for _ in range(3)]
        instance = workers[0].configure(configured(sandbox))
        skipping = workers[0].configure(configured(sandbox, filters={"methods": ["POST"]}))
        for kill in range(15):
            pid = reader_of(server)
            until = time.monotonic() + chance.uniform(0.05, 0.4)
            while time.monotonic() < until:
                worker = chance.choice(workers)
                lines = []
                for _ in range(chance.randrange(1, 200)):
                    lines.append(request_line(skipping if number % 5 == 0 else instance, f"r{number}"))
                    number += 1
                worker.write(*lines)
                worker.lose(disk_full=number)
                if chance.random() < 0.2:
                    worker.move_on()
            with suppress(ProcessLookupError):
                os.kill(pid, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)[kill % 3])
        reader_of(server)
        for worker in workers:
            worker.end()
        eventually(lambda: not list(folder.glob("*.segment")), seconds=30, what="reading all")
        skipped = (number + 4) // 5
        eventually(lambda: stored(sandbox) == number - skipped, seconds=60, what="the delivery")
        eventually(lambda: not list(folder.glob("*.lost")), seconds=10, what="the counters")
        lost = sum(worker.counted for worker in workers)
        eventually(lambda: total_counts(server.spool).get(("lost", "disk_full")) == lost, what="the losses")
        books = total_counts(server.spool)
    assert books["requests", ""] == number
    assert books["metered", ""] == books["events", ""] == number - skipped
    assert books["skipped", "method_excluded"] == skipped
    assert books.get(("resent", ""), 0) == 0
    assert books.get(("violations", ""), 0) == 0


def test_a_reader_that_hangs_is_replaced(tmp_path: Path, sandbox: str) -> None:
    folder = tmp_path / "segments"
    with plugin_server(tmp_path, "--segments", str(folder), "--hang-timeout", "2") as server:
        pid = reader_of(server)
        eventually((folder / "instances").is_dir, what="the folder")
        worker = Worker(folder)
        os.kill(pid, signal.SIGSTOP)
        worker.write(request_line(worker.configure(configured(sandbox)), "r1"))
        eventually(lambda: stored(sandbox) == 1, seconds=20, what="the arrival")
        assert server.child("segments") != pid


def test_what_is_in_the_folder_when_the_server_stops_is_in_the_spool(tmp_path: Path, sandbox: str) -> None:
    folder = tmp_path / "segments"
    with plugin_server(tmp_path, "--segments", str(folder)) as server:
        reader_of(server)
        eventually((folder / "instances").is_dir, what="the folder")
        worker = Worker(folder)
        instance = worker.configure(configured(sandbox))
        worker.write(*[request_line(instance, f"r{number}") for number in range(3000)])
        worker.end()
        assert server.stop() == 0
        assert not list(folder.glob("*.segment"))
    with plugin_server(tmp_path, "--segments", str(folder)):
        eventually(lambda: stored(sandbox) == 3000, what="the arrival")


def test_two_servers_share_a_folder_one_after_the_other(tmp_path: Path, sandbox: str) -> None:
    """As two containers with the same volumes: the second waits for the first one's lock, by no pid."""
    folder = tmp_path / "segments"
    other = tmp_path / "other"
    other.mkdir()
    spool = str(tmp_path / "spool")
    with plugin_server(tmp_path, "--segments", str(folder)) as first:
        reader_of(first)
        eventually((folder / "instances").is_dir, what="the folder")
        worker = Worker(folder)
        instance = worker.configure(configured(sandbox))
        with plugin_server(other, "--segments", str(folder), "--spool", spool) as second:
            reader_of(second)
            for number in range(50):
                worker.write(request_line(instance, f"r{number}"))
                if number == 25:
                    first.process.send_signal(signal.SIGKILL)
            eventually(lambda: stored(sandbox) == 50, seconds=30, what="the arrival")
            eventually(lambda: total_counts(tmp_path / "spool").get(("requests", "")) == 50, what="the books")
            assert total_counts(tmp_path / "spool").get(("resent", ""), 0) == 0


def test_a_folder_that_is_gone_with_its_container_is_made_again(tmp_path: Path, sandbox: str) -> None:
    folder = tmp_path / "segments"
    with plugin_server(tmp_path, "--segments", str(folder)) as server:
        reader_of(server)
        for number in range(3):
            eventually((folder / "instances").is_dir, what="the folder")
            worker = Worker(folder)
            worker.write(request_line(worker.configure(configured(sandbox)), f"r{number}"))
            eventually(lambda number=number: stored(sandbox) == number + 1, what="the arrival")  # type: ignore[misc]
            worker.end()
            shutil.rmtree(folder)


def test_thousands_of_files_are_read_in_bounded_memory(tmp_path: Path) -> None:
    folder, spool = tmp_path / "segments", tmp_path / "spool"
    worker = Worker(folder)
    instance = worker.configure(configuration())
    head = encode_head()
    files = int(os.environ.get("SEGMENT_FILES", "2000"))
    for number in range(files):
        line = request_line(instance, f"r{number}")
        (folder / f"1-{number % 7}-ab-{number:06d}.segment").write_bytes(head + line)
    write_segment(folder, head)
    with plugin_server(tmp_path, "--segments", str(folder)) as server:
        pid = reader_of(server)
        eventually(lambda: not list(folder.glob("*.segment")), seconds=120, what="reading all")
        memory = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line]
        assert int(memory[0].split()[1]) < 150 * 1024
        assert server.child("segments") == pid
        eventually(lambda: total_counts(spool).get(("requests", "")) == files, seconds=30, what="the books")
