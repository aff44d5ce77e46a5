"""The plugin server against stock kong-pdk, and against a bare loop that posts the same batches."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.bench.driver import MsgPack, ProtoBuf, Protocol, Run, drive
from tests.bench.processes import (
    Server,
    Sink,
    bare,
    cpu_seconds,
    kong_pdk,
    ours,
    pss_bytes,
    reading_segments,
    sink,
)
from tests.harness.kong_segments import Worker, encode_line
from tests.harness.process import eventually
from tests.harness.recordings import serialized

CONCURRENCY = 32
_ALL = ("--until-empty", "--retention-size", "1000GiB")


@dataclass(frozen=True)
class Measured:
    """One run of one server: CPU microseconds per event, events per second, PSS in bytes."""

    cpu_us: float
    rate: float
    pss: int


@dataclass(frozen=True)
class Contender:
    """A server to measure: how to start it, how to talk to it, how many events a run takes."""

    name: str
    run: Callable[[Path], AbstractContextManager[Server]]
    protocol: Callable[[], Protocol]
    events: int
    delivers: bool = False
    segments: bool = False
    """Whether the requests come in Kong segments."""


SEGMENTS = "openmeter-plugin, Kong segments"
CONTENDERS = (
    Contender("openmeter-plugin", ours, ProtoBuf, 40_000, delivers=True),
    Contender(SEGMENTS, reading_segments, ProtoBuf, 40_000, delivers=True, segments=True),
    Contender("bare asyncio server", bare, ProtoBuf, 40_000),
    Contender("kong-pdk, gevent", lambda d: kong_pdk(d, "-g"), lambda: MsgPack("jsonloads"), 10_000),
    Contender("kong-pdk, threads", kong_pdk, lambda: MsgPack("jsonloads"), 5_000),
)


_MEMBERS = ("request", "response", "latencies", "route", "service", "consumer", "started_at", "source")
_RATE = 10_000  # requests per second that one nginx worker writes
_MOVE_ON = 2500  # requests to a segment: 1 MiB


def write(worker: Worker, config: dict[str, Any], events: int, first: int = 0) -> Run:
    """Write requests to Kong segments, at a steady rate: a backlog would be cheaper to read."""
    instance = worker.configure(orjson.dumps(config))
    log = {name: serialized("authenticated").parsed[name] for name in _MEMBERS}
    began = time.perf_counter()
    for number in range(first, first + events):
        log["request"] = {"id": f"{number:032x}", "method": "GET", "size": 100}
        worker.write(encode_line(orjson.dumps({"i": instance, "log": log})))
        if number % _MOVE_ON == 0:
            worker.move_on()
        if number % 100 == 0:
            time.sleep(max(0.0, began + (number - first) / _RATE - time.perf_counter()))
    return Run(events, time.perf_counter() - began)


def config(endpoint: Sink) -> dict[str, Any]:
    """Return the plugin's configuration."""
    return {"ingest_endpoint": endpoint.endpoint, "__plugin_id": "bench"}


def measure(contender: Contender) -> Measured:
    """Run a contender once: warmed up, then measured until its last event is where it belongs."""
    with (
        tempfile.TemporaryDirectory() as directory,
        sink() as endpoint,
        contender.run(Path(directory)) as server,
    ):
        protocol = contender.protocol()
        warm_up = contender.events // 10
        worker = Worker(Path(directory) / "segments") if contender.segments else None

        def request(events: int, first: int) -> Run:
            if worker is not None:
                return write(worker, config(endpoint), events, first)
            return drive(
                server.socket,
                protocol,
                config(endpoint),
                events=events,
                concurrency=CONCURRENCY,
                first=first,
            )

        request(warm_up, 0)
        if contender.delivers:
            eventually(lambda: endpoint.received() == warm_up, seconds=60, what="the delivery")
        before = cpu_seconds(server.pid)
        run = request(contender.events, warm_up)
        total = contender.events + warm_up
        if contender.delivers:
            eventually(lambda: endpoint.received() == total, seconds=60, what="the delivery")
        used = cpu_seconds(server.pid) - before
        return Measured(used / contender.events * 1e6, run.rate, pss_bytes(server.pid))


def compare(rounds: int, tell: Callable[[str], None]) -> dict[str, list[Measured]]:
    """Measure each contender in turn, round after round, so that the machine's moods meet all alike."""
    results: dict[str, list[Measured]] = {contender.name: [] for contender in CONTENDERS}
    for number in range(rounds):
        for contender in CONTENDERS:
            tell(f"round {number + 1} of {rounds}: {contender.name}")
            results[contender.name].append(measure(contender))
    return results


def ratios(results: dict[str, list[Measured]], peer: str, value: Callable[[Measured], float]) -> float:
    """Return the median over the rounds of ours divided by the peer's."""
    pairs = zip(results["openmeter-plugin"], results[peer], strict=True)
    return statistics.median(value(our) / value(their) for our, their in pairs)


@dataclass(frozen=True)
class Memory:
    """PSS of the process tree in bytes: after warming up, after all events, with all of them waiting."""

    early: int
    late: int
    waiting: int


def memory(events: int, tell: Callable[[str], None]) -> Memory:
    """Return the memory over so many events delivered, and over so many that nobody takes."""
    with tempfile.TemporaryDirectory() as directory, sink() as endpoint, ours(Path(directory)) as server:
        tell(f"memory over {events:,} events")
        warm_up = min(20_000, events)
        drive(server.socket, ProtoBuf(), config(endpoint), events=warm_up, concurrency=CONCURRENCY)
        # Else it would be chance how much of the delivery is in either figure.
        eventually(lambda: endpoint.received() == warm_up, seconds=60, what="the delivery")
        early = pss_bytes(server.pid)
        drive(
            server.socket, ProtoBuf(), config(endpoint), events=events, concurrency=CONCURRENCY, first=warm_up
        )
        eventually(lambda: endpoint.received() == warm_up + events, seconds=300, what="the delivery")
        late = pss_bytes(server.pid)
    with tempfile.TemporaryDirectory() as directory, ours(Path(directory)) as server:
        tell(f"memory with {events:,} events waiting")
        nobody = {"ingest_endpoint": "http://127.0.0.1:9/api/v1/events", "__plugin_id": "bench"}
        drive(server.socket, ProtoBuf(), nobody, events=events, concurrency=CONCURRENCY)
        return Memory(early, late, pss_bytes(server.pid))


@dataclass(frozen=True)
class Drain:
    """Seconds to deliver the same backlog: our delivery, and a bare httpx loop posting the same batches."""

    ours: float
    bare: float

    @property
    def ratio(self) -> float:
        """Our speed divided by the bare loop's."""
        return self.bare / self.ours


def drain(events: int, rounds: int, tell: Callable[[str], None]) -> list[Drain]:
    """Fill a spool, then time both on it, in turn; each is a process of its own, start-up included."""
    with tempfile.TemporaryDirectory() as directory, sink() as endpoint:
        folder = Path(directory)
        tell(f"filling a spool with {events:,} events")
        with ours(folder) as server:
            nobody = {"ingest_endpoint": "http://127.0.0.1:9/api/v1/events", "__plugin_id": "bench"}
            drive(server.socket, ProtoBuf(), nobody, events=events, concurrency=CONCURRENCY)
            spool = server.spool
        (description,) = spool.glob("queues/*/destination.json")
        description.write_text(
            description.read_text().replace("http://127.0.0.1:9/api/v1/events", endpoint.endpoint)
        )
        books = spool / "books.db"
        undelivered = books.read_bytes()
        found = []
        for number in range(rounds):
            tell(f"draining, round {number + 1} of {rounds}")
            # What was delivered is retained: with the books as they were, it waits again.
            for left in spool.glob("books.db-*"):
                left.unlink()
            books.write_bytes(undelivered)
            bare = _timed("-m", "tests.bench.bare_loop", str(spool), endpoint.endpoint, str(500))
            assert endpoint.received() == (2 * number + 1) * events
            own = _timed("-m", "openmeter_plugin", "deliver", "--spool", str(spool), *_ALL)
            assert endpoint.received() == (2 * number + 2) * events
            found.append(Drain(own, bare))
        return found


def _timed(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started
