"""Several workers behind one socket, and hung processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import Recorded, serialized

pytestmark = pytest.mark.slow


def configuration(sandbox: str, source: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "source": source,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": source,
        }
    )


def requests(plugins: list[PluginInstance], numbers: range) -> Iterator[tuple[PluginInstance, Recorded, str]]:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    for number in numbers:
        plugin = plugins[number % len(plugins)]
        request_id = f"{plugin.config['source']}-{number:06d}"
        yield plugin, Recorded(request_id, template.log.replace(original, request_id.encode())), request_id


def hand_over(server: PluginServer, plugins: list[PluginInstance], count: int, first: int = 0) -> KongWorker:
    async def run() -> KongWorker:
        worker = KongWorker(server.socket)
        for plugin in plugins:
            if plugin.instance_id is None:
                await worker.start(plugin)
        await drive(worker, requests(plugins, range(first, first + count)), concurrency=32)
        await worker.close()
        return worker

    return asyncio.run(run())


def stored(sandbox: str) -> int:
    return int(httpx.get(f"{sandbox}/sandbox/v1/stats").json()["events_stored"])


def test_an_instance_is_known_to_every_worker_when_kong_gets_its_answer(tmp_path: Path, sandbox: str) -> None:
    with plugin_server(tmp_path, "--workers", "3") as server:
        eventually(lambda: server.log_text().count('"serving"') == 3, what="three workers")
        plugins = [configuration(sandbox, f"s{n}") for n in range(20)]
        worker = hand_over(server, plugins, 2000)
        assert worker.tally.resent == 0
        assert len(worker.tally.acknowledged) == 2000
        eventually(lambda: stored(sandbox) == 2000, what="the arrival")
        sizes = [path.stat().st_size for path in server.spool.glob("queues/*/*.seg")]
        by_worker = {
            pid: sum(path.stat().st_size for path in server.spool.glob(f"queues/*/*-{pid}-*.seg"))
            for pid in {path.name.split("-")[1] for path in server.spool.glob("queues/*/*.seg")}
        }
        assert len(by_worker) == 3, "every worker served some"
        assert min(by_worker.values()) > sum(sizes) / 10, "none did nearly all of it"


def test_an_instance_that_kong_closed_is_unknown_to_every_worker(tmp_path: Path, sandbox: str) -> None:
    with plugin_server(tmp_path, "--workers", "2") as server:
        eventually(lambda: server.log_text().count('"serving"') == 2, what="two workers")
        plugin = configuration(sandbox, "s")

        async def run() -> None:
            worker = KongWorker(server.socket)
            number = await worker.start(plugin)
            await worker.close_instance(number)
            await worker.close()

        asyncio.run(run())
        eventually(lambda: server.log_text().count('"instance_closed"') == 2, what="closing everywhere")


def test_killing_one_of_several_workers_loses_nothing_that_was_acknowledged(
    tmp_path: Path, sandbox: str
) -> None:
    with plugin_server(tmp_path, "--workers", "2") as server:
        plugins = [configuration(sandbox, "a"), configuration(sandbox, "b")]
        before = hand_over(server, plugins, 200)
        assert len(before.tally.acknowledged) == 200
        victim = server.child("worker")
        assert victim
        os.kill(victim, signal.SIGKILL)
        worker = hand_over(server, plugins, 1000, first=200)
        acknowledged = set(worker.tally.acknowledged)
        assert len(acknowledged) == 1000 - len(worker.tally.lost)
        eventually(lambda: stored(sandbox) >= 200 + len(acknowledged), what="the arrival")


@pytest.mark.parametrize("name", ["worker", "delivery"])
def test_a_hung_process_is_replaced(tmp_path: Path, sandbox: str, name: str) -> None:
    with plugin_server(tmp_path, "--hang-timeout", "2") as server:
        plugin = configuration(sandbox, "s")
        hand_over(server, [plugin], 10)
        eventually(lambda: stored(sandbox) == 10, what="the arrival")
        hung = server.child(name)
        assert hung
        os.kill(hung, signal.SIGSTOP)
        eventually(lambda: server.child(name) not in (None, hung), what="the replacement")
        assert "process_hung" in server.log_text()
        hand_over(server, [plugin], 20)
        eventually(lambda: stored(sandbox) == 20, what="the arrival")
