"""kill -9 of the plugin server's processes under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import Recorded, serialized

pytestmark = pytest.mark.slow


def configuration(sandbox: str, source: str, field: str = "id") -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "source": source,
            "subject": {"look_up_value_in": "consumer", "field": field},
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": source,
        }
    )


def requests(
    plugin: PluginInstance, prefix: str, count: int
) -> Iterator[tuple[PluginInstance, Recorded, str]]:
    template = serialized("authenticated").log
    original = serialized("authenticated").parsed["request"]["id"].encode()
    for number in range(count):
        request_id = f"{prefix}{number:08d}"
        yield plugin, Recorded(request_id, template.replace(original, request_id.encode())), request_id


def stats(sandbox: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{sandbox}/sandbox/v1/stats").json()
    return answer


def usage(sandbox: str) -> dict[str, float]:
    """Return the requests that the metering API bills, by subject."""
    answer = httpx.get(f"{sandbox}/api/v1/meters/kong_api_requests/query", params={"groupBy": "subject"})
    return {row["subject"]: row["value"] for row in answer.json()["data"]}


def stored_ids(database: Path, source: str) -> set[str]:
    """Return the ids of a source's events in the metering API's database."""
    import sqlite3

    with sqlite3.connect(database) as db:
        return {row[0] for row in db.execute("SELECT id FROM events WHERE source = ?", (source,))}


def _killed(pid: int | None) -> bool:
    """Kill a process, unless it has just ended."""
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


async def kill_repeatedly(
    server: PluginServer, done: asyncio.Event, name: str, *, times: int, worker: KongWorker
) -> list[float]:
    """Kill a child process `times` times, a little apart; returns the duration of each outage."""
    outages: list[float] = []
    for _ in range(times):
        before = len(worker.tally.acknowledged)
        while len(worker.tally.acknowledged) < before + 300 and not done.is_set():
            await asyncio.sleep(0.005)
        await asyncio.to_thread(eventually, lambda: _killed(server.child(name)))
        killed, acknowledged = time.monotonic(), len(worker.tally.acknowledged)
        while len(worker.tally.acknowledged) < acknowledged + 40 and not done.is_set():
            await asyncio.sleep(0.001)
        outages.append(time.monotonic() - killed)
    return outages


def drive_and_kill(
    server: PluginServer,
    work: Iterator[tuple[PluginInstance, Recorded, str]],
    victim: str,
    times: int,
) -> tuple[KongWorker, list[float]]:
    async def run() -> tuple[KongWorker, list[float]]:
        worker, done = KongWorker(server.socket), asyncio.Event()
        killer = asyncio.create_task(kill_repeatedly(server, done, victim, times=times, worker=worker))
        await drive(worker, work, concurrency=16)
        done.set()
        await worker.close()
        return worker, await killer

    return asyncio.run(run())


def test_every_event_acknowledged_before_the_worker_was_killed_arrives_and_is_billed_once(
    tmp_path: Path,
) -> None:
    db = tmp_path / "sandbox.db"
    with running_sandbox(db) as sandbox, plugin_server(tmp_path) as server:
        plugin = configuration(sandbox, "kong")
        worker, outages = drive_and_kill(server, requests(plugin, "a", 4000), "worker", times=4)
        tally = worker.tally
        assert len(outages) == 4
        assert max(outages) < 1.0, "a new worker serves in under a second"
        assert tally.refused_connections == 0
        assert tally.resent + len(tally.lost) > 0, "it was killed under load"
        eventually(
            lambda: set(tally.acknowledged) <= stored_ids(db, "kong"),
            what="the arrival of what was acknowledged",
        )
        stored = stored_ids(db, "kong")
        assert stored <= set(tally.acknowledged) | set(tally.lost)
        eventually(lambda: sum(usage(sandbox).values()) == len(stored_ids(db, "kong")), what="the bill")
        received = stats(sandbox)
        assert received["events_received"] == received["events_stored"] + received["duplicates_received"]


def test_no_event_is_billed_under_another_instances_configuration_when_the_worker_is_killed(
    tmp_path: Path,
) -> None:
    db = tmp_path / "sandbox.db"
    with running_sandbox(db) as sandbox, plugin_server(tmp_path) as server:
        first = configuration(sandbox, "first")
        second = configuration(sandbox, "second", field="username")
        both = zip(requests(first, "f", 1500), requests(second, "s", 1500), strict=True)
        worker, _ = drive_and_kill(server, (item for pair in both for item in pair), "worker", times=4)
        acknowledged = set(worker.tally.acknowledged)
        eventually(
            lambda: acknowledged <= stored_ids(db, "first") | stored_ids(db, "second"), what="the arrival"
        )
        assert {event_id[0] for event_id in stored_ids(db, "first")} == {"f"}
        assert {event_id[0] for event_id in stored_ids(db, "second")} == {"s"}
        alice = serialized("authenticated").parsed["consumer"]
        assert usage(sandbox) == {
            f"consumer:{alice['id']}": len(stored_ids(db, "first")),
            alice["username"]: len(stored_ids(db, "second")),
        }


def test_an_id_from_before_the_kill_never_means_an_instance_started_after_it(tmp_path: Path) -> None:
    """One nginx worker was idle while the other had already restarted its instance."""
    db = tmp_path / "sandbox.db"
    with running_sandbox(db) as sandbox, plugin_server(tmp_path) as server:
        busy, idle = configuration(sandbox, "first"), configuration(sandbox, "second", field="username")
        for plugin, prefix in ((busy, "f"), (idle, "s")):
            asyncio.run(_drive(server, requests(plugin, prefix, 1)))
        killed = eventually(lambda: server.child("worker") or 0, what="a worker")
        os.kill(killed, signal.SIGKILL)
        busy.instance_id = None  # its connections broke
        asyncio.run(_drive(server, requests(busy, "F", 20)))
        worker = asyncio.run(_drive(server, requests(idle, "S", 20)))
        assert worker.tally.resent == 0, "the id is known from the file of its instance"
        eventually(lambda: len(stored_ids(db, "first") | stored_ids(db, "second")) == 42, what="the arrival")
        assert {event_id[0] for event_id in stored_ids(db, "first")} == {"f", "F"}
        assert {event_id[0] for event_id in stored_ids(db, "second")} == {"s", "S"}


def test_killing_the_delivery_loses_nothing_and_bills_nothing_twice(tmp_path: Path) -> None:
    db = tmp_path / "sandbox.db"
    with running_sandbox(db) as sandbox, plugin_server(tmp_path) as server:
        plugin = configuration(sandbox, "kong")
        worker, _ = drive_and_kill(server, requests(plugin, "a", 3000), "delivery", times=3)
        assert worker.tally.lost == []
        assert worker.tally.resent == 0
        eventually(lambda: len(stored_ids(db, "kong")) == 3000, what="the arrival")
        assert sum(usage(sandbox).values()) == 3000


def test_killing_the_supervisor_ends_its_children_and_the_next_one_delivers_what_they_left(
    tmp_path: Path,
) -> None:
    db = tmp_path / "sandbox.db"
    with running_sandbox(db) as sandbox:
        with plugin_server(tmp_path) as server:
            plugin = configuration(f"{sandbox}/nowhere", "kong")
            worker = asyncio.run(_drive(server, requests(plugin, "a", 500)))
            children = server.children()
            assert len(children) == 2
            server.stop(signal.SIGKILL)
            eventually(lambda: not any(_alive(pid) for pid in children), what="the end of the children")
        assert len(worker.tally.acknowledged) == 500
        with plugin_server(tmp_path) as server:
            _redirect(server.spool, f"{sandbox}/api/v1/events")
            eventually(lambda: len(stored_ids(db, "kong")) == 500, what="the arrival")


async def _drive(server: PluginServer, work: Iterator[tuple[PluginInstance, Recorded, str]]) -> KongWorker:
    worker = KongWorker(server.socket)
    await drive(worker, work, concurrency=8)
    await worker.close()
    return worker


def _redirect(spool: Path, endpoint: str) -> None:
    """Correct the endpoint of the only queue, as an operator would."""
    (description,) = spool.glob("queues/*/destination.json")
    description.write_text(json.dumps(json.loads(description.read_text()) | {"endpoint": endpoint}))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
