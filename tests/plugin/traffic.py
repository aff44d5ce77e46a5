"""Helpers for tests of restarts and kills: drive a server as Kong does, and disturb it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import eventually
from tests.harness.recordings import Recorded, serialized

TOKEN = "token-of-this-test"


def plugin(sandbox: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "api_token": TOKEN,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "restarted",
        }
    )


def request(number: int) -> tuple[Recorded, str]:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    request_id = f"{number:032x}"
    return Recorded(request_id, template.log.replace(original, request_id.encode())), request_id


def stored(sandbox: str) -> int:
    headers = {"authorization": f"Bearer {TOKEN}"}
    stats = httpx.get(f"{sandbox}/sandbox/v1/stats", headers=headers, trust_env=False).json()
    return int(stats["events_stored"])


def drive_through(
    path: Path, sandbox: str, disturb: Callable[[], object], *, times: int = 3, pause: float = 0.002
) -> KongWorker:
    """Drive a server as Kong does, and disturb it `times` times.

    With pauses between requests, connections become idle and are reused all the time; without, all are busy.
    """
    done = asyncio.Event()

    async def disturb_repeatedly(worker: KongWorker) -> None:
        for number in range(times + 1):
            before = len(worker.tally.acknowledged)
            while len(worker.tally.acknowledged) < before + 200:
                await asyncio.sleep(0.005)
            if number < times:
                await asyncio.to_thread(disturb)
        done.set()

    def requests() -> Iterator[tuple[PluginInstance, Recorded, str]]:
        instance, number = plugin(sandbox), 0
        while not done.is_set():
            recorded, tag = request(number)
            yield instance, recorded, tag
            number += 1

    async def send_requests(worker: KongWorker, work: Iterator[tuple[PluginInstance, Recorded, str]]) -> None:
        for instance, recorded, tag in work:
            await worker.log(instance, recorded, tag)
            await asyncio.sleep(pause)

    async def run() -> KongWorker:
        worker = KongWorker(path)
        work = requests()
        async with asyncio.TaskGroup() as group:
            group.create_task(disturb_repeatedly(worker))
            for _ in range(16):
                group.create_task(send_requests(worker, work))
        await worker.close()
        return worker

    return asyncio.run(run())


def assert_nothing_lost(worker: KongWorker, sandbox: str) -> None:
    """Check that Kong gave up no event, and that every acknowledged event arrives."""
    tally = worker.tally
    assert (dict(tally.reasons), tally.refused_connections) == ({}, 0)
    eventually(lambda: stored(sandbox) >= len(tally.acknowledged), what="the arrival")
    assert stored(sandbox) == len(tally.acknowledged)
