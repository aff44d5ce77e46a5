"""Start with a large backlog: when Kong gets its first answer, how much memory, and how fast it drains.

The backlog is one that is not in the books yet: all of it has to be counted before it is posted.

    make bench ARGS="--only backlog --backlog 5"
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import MAGIC, encode_usage
from tests.bench.driver import ProtoBuf, drive
from tests.bench.goals import Goal
from tests.bench.processes import MIB, cpu_seconds, pss_bytes, sink
from tests.harness.process import eventually, plugin_server
from tests.plugin.spools import QUEUE, destination

SEGMENT = 16 * MIB
_DIFFERENT = 8
"""Segments with ids of their own. The others are copies: far apart, so that none counts as resent."""
_SECONDS = 20.0
"""For how long the drain is watched."""


@dataclass(frozen=True)
class Start:
    """Seconds until Kong had an answer, the largest PSS in bytes, and events per second that arrived."""

    ready: float
    pss: int
    rate: float


def fill(spool: Path, endpoint: str, gib: float) -> int:
    """Write the backlog; returns how many events it has."""
    write_destination(spool, destination(endpoint, max_batch_size=500, timeout=10.0))
    directory = spool / "queues" / QUEUE
    numbers = itertools.count()
    events = 0
    made: list[tuple[Path, int]] = []
    for place in range(int(gib * 1024 * MIB / SEGMENT)):
        path = directory / f"{place:020d}-1-{place}.seg"
        if place < _DIFFERENT:
            made.append((path, _write_segment(path, numbers)))
        else:
            shutil.copyfile(made[place % _DIFFERENT][0], path)
        events += made[place % _DIFFERENT][1]
    return events


def _write_segment(path: Path, numbers: Iterator[int]) -> int:
    events = 0
    with path.open("wb") as file:
        file.write(MAGIC)
        while file.tell() < SEGMENT:
            number = next(numbers)
            file.write(_record(f"{number:032x}", f"consumer:{number % 1000:036d}"))
            events += 1
    return events


def _record(request: str, subject: str) -> bytes:
    moment, kind = "2026-11-22T05:49:03.779Z", "kong.api_request"
    data = {"request_method": "GET", "route_name": "route", "service_name": "service", "status": 200}
    fixed = {"specversion": "1.0", "source": "kong", "type": kind, "subject": subject, "time": moment}
    event = orjson.dumps({"id": request, **fixed, "data": data | {"path": "/a/path/of/ordinary/length" * 8}})
    return encode_usage([event], [kind], moment, request, subject)


def measure(gib: float, tell: Callable[[str], None]) -> Start:
    """Start a server on a backlog of so many GiB, and watch the first seconds of its drain."""
    with tempfile.TemporaryDirectory() as directory, sink() as endpoint:
        folder = Path(directory)
        tell(f"writing a backlog of {gib:g} GiB")
        events = fill(folder / "spool", endpoint.endpoint, gib)
        tell(f"starting with {events:,} events")
        config = {"ingest_endpoint": endpoint.endpoint, "__plugin_id": "bench"}
        started = time.monotonic()
        with plugin_server(folder) as server:
            drive(server.socket, ProtoBuf(), config, events=1, concurrency=1)
            ready = time.monotonic() - started
            eventually(endpoint.received, seconds=60, what="the first batch")
            largest, began, before = 0, time.monotonic(), endpoint.received()
            while (passed := time.monotonic() - began) < _SECONDS and endpoint.received() < events:
                largest = max(largest, pss_bytes(server.process.pid))
                time.sleep(0.2)
            rate = (endpoint.received() - before) / passed
            tell(
                f"{cpu_seconds(server.process.pid):.1f} s of CPU time, {before:,} events with the first look"
            )
        return Start(ready, largest, rate)


def run(gib: float, console: Console, tell: Callable[[str], None]) -> list[Goal]:
    """Measure, and return the goals."""
    start = measure(gib, tell)
    console.print(f"draining: {start.rate:,.0f} events/s in the first {_SECONDS:.0f} s")
    mib = start.pss / MIB
    return [
        Goal(f"first answer, {gib:g} GiB waiting", "1 s or less", f"{start.ready:.2f} s", start.ready <= 1),
        Goal(f"memory, {gib:g} GiB waiting", "under 120 MiB", f"{mib:.0f} MiB", mib < 120),
    ]
