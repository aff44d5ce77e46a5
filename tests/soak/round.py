"""One round of trouble: load, kill -9 at random points, a metering API that fails; then the count.

Whatever happened, what Kong had an answer for is in the metering API, counted once, and the books of the
plugin server agree. Everything that is random comes from the round's seed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random

import httpx

from syncd.sandbox.testing import running_sandbox
from tests.harness.books import read_counts, read_dead_letters
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import Recorded, serialized

_EVENTS = "/api/v1/events"
_POISONED = 777  # the number of the request whose event is refused for good


class Trouble(StrEnum):
    """What the metering API does while it is driven."""

    NONE = "none"
    ERRORS = "answers 500"
    BUSY = "answers 429"
    ONE_BAD_EVENT = "refuses one event"
    SLOW = "accepts and lets time out"
    CUT = "accepts and cuts the answer"
    AWAY = "is away for a while"


@dataclass(frozen=True)
class Report:
    """What a round came to, in requests and events."""

    seed: int
    trouble: Trouble
    driven: int
    acknowledged: int
    given_up_by_kong: int
    sent_again_by_kong: int
    kills: tuple[str, ...]
    billed: int
    duplicates_received: int


class RoundFailed(AssertionError):
    """A promise was broken; the message says which, with the seed to see it again."""


@dataclass
class Server:
    """The plugin server, which may be another one after the supervisor was killed."""

    directory: Path
    running: PluginServer
    stack: ExitStack

    @classmethod
    def start(cls, directory: Path, stack: ExitStack) -> Server:
        """Start it."""
        return cls(directory, stack.enter_context(plugin_server(directory)), stack)

    def kill(self, victim: str) -> None:
        """Kill one of its processes with SIGKILL; the supervisor's place is taken at once."""
        if victim == "supervisor":
            self.running.process.kill()
            self.running.process.wait()
            self.running = self.stack.enter_context(plugin_server(self.directory))
            return
        pid = eventually(lambda: self.running.child(victim) or 0, what=f"a {victim}")
        os.kill(pid, signal.SIGKILL)


def run_round(
    directory: Path, seed: int, trouble: Trouble, *, requests: int = 4_000, kills: int = 4
) -> Report:
    """Run a round; raises RoundFailed."""
    random = Random(seed)
    victims = tuple(random.choice(("worker", "worker", "delivery", "supervisor")) for _ in range(kills))
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(directory / "sandbox.db"))
        server = Server.start(directory, stack)
        plugin = _plugin(sandbox.url)
        worker = KongWorker(server.running.socket)
        asyncio.run(_drive(worker, plugin, requests, server, sandbox, trouble, victims, random))
        sandbox.calm()
        problems = _settle(server.running, sandbox, worker, trouble)
        if problems:
            raise RoundFailed(f"seed {seed}, {trouble}, killed {', '.join(victims)}: " + "; ".join(problems))
        tally = worker.tally
        stats = sandbox.stats()
        return Report(
            seed,
            trouble,
            requests,
            len(tally.acknowledged),
            len(tally.lost),
            tally.resent,
            victims,
            stats["events_stored"],
            stats["duplicates_received"],
        )


class Sandbox:
    """A metering API that can be made to fail, and to go away and come back as the same one."""

    def __init__(self, db: Path) -> None:
        self._db = db
        self._stack = ExitStack()
        self._port = 0
        self.url = ""

    def __enter__(self) -> Sandbox:
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def come(self) -> None:
        """Start, or come back at the same place with the same memory."""
        self.url = self._stack.enter_context(running_sandbox(self._db, port=self._port))
        self._port = int(self.url.rpartition(":")[2])

    def go(self) -> None:
        """Go away."""
        self._stack.close()

    def fail(self, **fault: object) -> None:
        """Put a fault in force."""
        httpx.post(f"{self.url}/sandbox/v1/faults", json=fault, trust_env=False).raise_for_status()

    def calm(self) -> None:
        """Take all faults out of force, but for the event that is refused for good."""
        faults = httpx.get(f"{self.url}/sandbox/v1/faults", trust_env=False).json()
        httpx.delete(f"{self.url}/sandbox/v1/faults", trust_env=False).raise_for_status()
        for fault in faults:
            if fault.get("event_id"):
                self.fail(event_id=fault["event_id"], status=fault["status"])

    def stats(self) -> dict[str, int]:
        """Return its counts."""
        answer: dict[str, int] = httpx.get(f"{self.url}/sandbox/v1/stats", trust_env=False).json()
        return answer

    def ids(self) -> set[str]:
        """Return the ids of the events that it holds."""
        with sqlite3.connect(self._db) as db:
            return {row[0] for row in db.execute("SELECT id FROM events")}


def _plugin(url: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{url}{_EVENTS}",
            "timeout": 500,
            "queue": {"max_coalescing_delay": 0.05, "max_retry_delay": 0.3, "max_batch_size": 100},
            "__plugin_id": "soak",
        }
    )


def _requests(plugin: PluginInstance, count: int) -> Iterator[tuple[PluginInstance, Recorded, str]]:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    for number in range(count):
        name = _name(number)
        yield plugin, Recorded(name, template.log.replace(original, name.encode())), name


def _name(number: int) -> str:
    return f"{number:032x}"


async def _drive(
    worker: KongWorker,
    plugin: PluginInstance,
    requests: int,
    server: Server,
    sandbox: Sandbox,
    trouble: Trouble,
    victims: tuple[str, ...],
    random: Random,
) -> None:
    async with _troubled(sandbox, trouble):
        driving = asyncio.create_task(drive(worker, _requests(plugin, requests), concurrency=16))
        for number, victim in enumerate(victims):
            share = (number + random.random()) / len(victims)
            while len(worker.tally.acknowledged) < share * requests and not driving.done():
                await asyncio.sleep(0.002)
            await asyncio.to_thread(server.kill, victim)
        await driving
    await worker.close()


@asynccontextmanager
async def _troubled(sandbox: Sandbox, trouble: Trouble) -> AsyncIterator[None]:
    events = {"path": _EVENTS, "method": "POST"}
    if trouble is Trouble.ERRORS:
        sandbox.fail(**events, status=500, count=20)
    elif trouble is Trouble.BUSY:
        sandbox.fail(**events, status=429, retry_after=1, count=3)
    elif trouble is Trouble.ONE_BAD_EVENT:
        sandbox.fail(event_id=_name(_POISONED), status=400)
    elif trouble is Trouble.SLOW:
        sandbox.fail(**events, action="accept_then_timeout", count=3)
    elif trouble is Trouble.CUT:
        sandbox.fail(**events, action="accept_then_cut", count=10)
    elif trouble is Trouble.AWAY:
        await asyncio.to_thread(sandbox.go)
        yield
        await asyncio.to_thread(sandbox.come)
        return
    yield


def _settle(server: PluginServer, sandbox: Sandbox, worker: KongWorker, trouble: Trouble) -> list[str]:
    """Wait for the last event and return what is not as it must be."""
    expected = set(worker.tally.acknowledged)
    refused = {_name(_POISONED)} if trouble is Trouble.ONE_BAD_EVENT else set()

    def arrived() -> bool:
        return expected - refused <= sandbox.ids()

    try:
        eventually(arrived, seconds=30, what="the arrival")
        eventually(lambda: _waiting(server.spool) == 0, seconds=10, what="an empty spool")
    except AssertionError:
        missing = len(expected - refused - sandbox.ids())
        return [f"{missing} acknowledged events did not arrive, {_waiting(server.spool)} wait in the spool"]
    problems = []
    stored = sandbox.ids()
    # What Kong gave up may have been written all the same: its answer was lost, not the event.
    if not stored <= expected | set(worker.tally.lost):
        problems.append("events arrived that were never driven")
    billed = httpx.get(f"{sandbox.url}/api/v1/meters/kong_api_requests/query", trust_env=False).json()
    total = sum(row["value"] for row in billed["data"])
    if total != len(stored):
        problems.append(f"{total} requests are billed for {len(stored)} events")
    dead = {letter.event for _, _, letter in read_dead_letters(server.spool)}
    if len(dead) != len(refused & expected):
        problems.append(f"{len(dead)} dead letters instead of {len(refused & expected)}")
    return problems + _unbalanced(server.spool)


def _total(spool: Path, *names: str) -> int:
    counts = read_counts(spool).values()
    return sum(value for queue in counts for (name, _), value in queue.items() if name in names)


def _waiting(spool: Path) -> int:
    return _total(spool, "events") - _total(spool, "delivered", "dead_lettered")


def _unbalanced(spool: Path) -> list[str]:
    requests = _total(spool, "requests")
    parts = _total(spool, "metered", "skipped", "quarantined", "resent")
    return [] if requests == parts else [f"{requests} requests in the books, {parts} accounted for"]
