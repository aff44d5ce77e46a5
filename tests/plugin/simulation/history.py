"""One short history of a spool: what happens to it is drawn from a seed, and at the end the books are due.

Everything is real but time, the network and what goes wrong: the writer (driven without its threads), the
files, SQLite, the delivery of all queues. A step is a read, a commit or a POST; the delivery process may be
killed at each.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import sqlite3
import tempfile
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import orjson
import structlog

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.equations import Counts, total, violations
from openmeter_plugin.books.replay import replay_dead_letters
from openmeter_plugin.delivery import pipeline
from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.options import RESEND_WINDOW, DeliveryOptions, Retention
from openmeter_plugin.delivery.process import SpoolDelivery, _open_books
from openmeter_plugin.spool import queue as spool_queue
from openmeter_plugin.spool import writer as writer_module
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, write_destination
from openmeter_plugin.spool.queue import Segment
from openmeter_plugin.spool.segment import SUFFIX
from openmeter_plugin.spool.writer import SpoolWriter
from tests.plugin.deliveries import record, skip
from tests.plugin.simulation.faults import CrashError, Disk, MeteringApi
from tests.plugin.simulation.virtual import START, Clock, new_loop
from tests.plugin.spool_commands import quarantine_record
from tests.plugin.spools import destination

QUEUES = ("aaaa000000000001", "aaaa000000000002")
TIME = "2026-11-27T05:49:03.779Z"


@dataclass(slots=True)
class Accepted:
    """A record that Kong has its answer for: its bytes, queue and the ids of its events."""

    raw: bytes
    queue: str
    ids: list[str]
    resent: bool = False
    """Whether it is in the spool twice: if the copy in the books is damaged, the other one is not sent."""
    held_up: bool = False
    """Whether the second copy waited in memory for a disk that refused it."""
    saved: bool = False
    """Whether it may have been copied out of a removed segment that delivery reads too."""
    subject: str = ""
    """The subject of its events; in some histories each record has one of its own."""


@dataclass(slots=True)
class Outcome:
    """What a history came to, for statistics over many."""

    actions: list[str] = field(default_factory=list)
    events: int = 0
    delivered: int = 0
    dead: int = 0
    lost: int = 0
    excused: int = 0


class Worker:
    """A writer without its threads: the history says when it writes, syncs and dies."""

    def __init__(self, spool: Path, fsync: writer_module.Fsync) -> None:
        self.answered: list[Accepted] = []
        self.writer = SpoolWriter(
            spool, self.answered.extend, fsync=fsync, segment_bytes=1500, max_waiting_bytes=3000
        )

    def write(self, records: list[Accepted]) -> None:
        items = [(self.writer.queue(one.queue), one.raw, one, None) for one in records]
        tokens, left = self.writer.append_now(items)
        self.answered += tokens
        if left:
            self.writer._commit(left)

    def tick(self) -> None:
        """Do what the threads would: retry what the disk refused, sync, close."""
        self.writer._commit([])
        self.writer._syncer._look_after_open()
        self.writer._syncer._close_retired()

    def close(self) -> None:
        for queue in self.writer._queues.values():
            assert not queue.failing
            queue.retire()
        self.writer._syncer._close_retired()

    def in_memory(self) -> bytes:
        """Return what waits for a disk that refuses it."""
        return b"".join(raw for queue in self.writer._queues.values() for raw in queue.waiting)

    def in_removed_files(self) -> bytes:
        """Return what is in segments that were removed while they were open."""
        content = b""
        for segment in [*self._retired(), *self.writer._open_segments()]:
            if not os.fstat(segment.descriptor).st_nlink:
                content += Path(f"/proc/self/fd/{segment.descriptor}").read_bytes()
        return content

    def _retired(self) -> list[Segment]:
        queue = self.writer._rotation.retired
        segments = [queue.get() for _ in range(queue.qsize())]
        for segment in segments:
            queue.put(segment)
        return segments

    def unclosed(self) -> list[Path]:
        """Return the segments that are not closed yet."""
        return [segment.path for segment in [*self._retired(), *self.writer._open_segments()]]

    def kill(self, torn: bytes) -> None:
        """End as kill -9 does, perhaps in the middle of a record."""
        retired = self.writer._rotation.retired
        while not retired.empty():
            os.close(retired.get_nowait().descriptor)
        for queue in self.writer._queues.values():
            if queue.segment is not None:
                with contextlib.suppress(OSError):
                    os.write(queue.segment.descriptor, torn)
                os.close(queue.segment.descriptor)


class History:
    """A spool, its workers and its delivery process, from an empty folder to an empty backlog."""

    def __init__(self, seed: int, spool: Path) -> None:
        self.rng = random.Random(seed)
        self.spool = spool
        self.clock = Clock()
        self.disk = Disk(spool, self.rng)
        self.disk.on_commit = self.check_books
        self.api = MeteringApi(self.rng, self.disk.step)
        self.outcome = Outcome()
        self.accepted: list[Accepted] = []
        self.excused: set[bytes] = set()  # records whose bytes the disk or a kill took
        self.synced: set[bytes] = set()  # records that even a power loss must leave
        self.left_unsynced: set[Path] = set()  # segments of killed workers, which nobody syncs any more
        self.may_lose = False
        self.number = 0
        rng = self.rng
        self.fsync: writer_module.Fsync = rng.choice(["interval", "interval", "never", "always"])
        self.own_subjects = rng.random() < 0.5
        self.max_age = rng.choice([None, None, timedelta(days=30)])
        self.retention = rng.choice([timedelta(0), timedelta(seconds=1), timedelta(days=1)])
        # With the whole window hardly a file is removed before a history ends.
        self.resend_window = RESEND_WINDOW if seed % 2 else timedelta(seconds=0.5)
        self.delivery: asyncio.Task[None] | None = None
        for queue in QUEUES:
            address = "http://api/events"
            write_destination(
                spool,
                destination(
                    address,
                    id=queue,
                    max_batch_size=rng.choice([1, 3, 10, 500]),
                    concurrency=rng.choice([1, 1, 4]),
                    max_coalescing_delay=rng.choice([0.0, 0.3]),
                ),
            )
        self.workers = [Worker(spool, self.fsync), Worker(spool, self.fsync)]

    async def run(self) -> None:
        self.start()
        actions = [
            *[self.write] * 6,
            *[self.pass_by] * 4,
            *[self.tick] * 2,
            *[self.change_weather] * 2,
            self.disk_refuses,
            self.disk_reads_badly,
            self.books_fail,
            self.all_is_well,
            self.kill_delivery,
            self.kill_delivery,
            self.kill_worker,
            self.rotate,
            self.clock_jumps,
            self.replay,
        ]
        if self.rng.random() < 0.4:
            actions += [self.power_loss, self.flip_a_byte, self.remove_a_segment]
        for _ in range(self.rng.randint(5, 18)):
            action = self.rng.choice(actions)
            self.outcome.actions.append(action.__name__)
            await action()
            if self.disk.crashed:
                await self.restart()
        await self.finish()

    # What happens

    async def write(self) -> None:
        self.rng.choice(self.workers).write([self.new_record() for _ in range(self.rng.randint(1, 8))])
        self.note_answers()

    def new_record(self) -> Accepted:
        rng, self.number = self.rng, self.number + 10
        queue = rng.choice(QUEUES)
        kind = rng.random()
        if kind < 0.1:
            return Accepted(skip(), queue, [])
        if kind < 0.15:
            return Accepted(quarantine_record(self.number), QUARANTINE, [])
        numbers = range(self.number, self.number + rng.choice([1, 1, 1, 2, 3]))
        ids = [f"event-{number:06d}" for number in numbers]
        self.api.bad.update(name for name in ids if rng.random() < 0.05)
        subject = f"s{self.number}" if self.own_subjects else rng.choice("abc")
        return Accepted(record(*numbers, subject=subject, time=TIME), queue, ids, subject=subject)

    def note_answers(self) -> None:
        for worker in self.workers:
            self.accepted += worker.answered
            worker.answered.clear()
        if self.fsync == "always":
            self.note_synced()

    def note_saved(self, worker: Worker) -> None:
        """Note what may be copied out of removed files, in which delivery may read it too."""
        if removed := worker.in_removed_files():
            for one in self.accepted:
                one.saved = one.saved or one.raw in removed

    def note_synced(self) -> None:
        """Note that by now the writers have synced what they wrote."""
        content = self.in_synced_segments()
        self.synced.update(one.raw for one in self.accepted if one.raw in content)

    def in_synced_segments(self) -> bytes:
        """Return the content of all segments whose writer lives or has closed them."""
        paths = self.spool.glob(f"queues/*/*{SUFFIX}")
        return b"".join(path.read_bytes() for path in paths if path not in self.left_unsynced)

    def in_segments(self) -> bytes:
        """Return the content of all segments, unreadable ones included."""
        return b"".join(path.read_bytes() for path in self.spool.glob(f"queues/*/*{SUFFIX}*"))

    async def pass_by(self) -> None:
        await asyncio.sleep(self.rng.choice([0.03, 0.3, 1.5]))

    async def tick(self) -> None:
        for worker in self.workers:
            self.note_saved(worker)
            worker.tick()
        if self.fsync != "never":
            self.note_synced()

    async def change_weather(self) -> None:
        self.api.weather = self.rng.choice(["fine", "503", "mixed", "mixed", "timeout", "lost answer", "cut"])

    async def disk_refuses(self) -> None:
        self.disk.refusing = self.rng.choice([errno.ENOSPC, errno.EIO])

    async def disk_reads_badly(self) -> None:
        self.disk.unreadable = True

    async def books_fail(self) -> None:
        self.disk.books_fail = True

    async def all_is_well(self) -> None:
        self.disk.refusing, self.disk.unreadable, self.disk.books_fail = None, False, False
        self.api.weather = "fine"

    async def clock_jumps(self) -> None:
        jump = self.rng.choice([31 * 86400.0, -31 * 86400.0, 7200.0])
        self.clock.offset += jump
        await self.pass_by()
        if self.rng.random() < 0.3:
            await self.restart()
            await self.pass_by()
        self.clock.offset -= jump

    async def replay(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            replay_dead_letters(self.spool)
        self.api.bad -= set(self.rng.sample(sorted(self.api.bad), len(self.api.bad) // 2))

    async def kill_delivery(self) -> None:
        self.disk.steps_to_crash = self.rng.randint(0, 25)
        await self.pass_by()

    async def rotate(self) -> None:
        for queue in self.rng.choice(self.workers).writer._queues.values():
            queue.retire()
        await self.tick()

    async def kill_worker(self) -> None:
        """Kill a worker that has written a record but not answered; Kong hands it to the other one."""
        place = self.rng.randrange(2)
        unanswered = [self.new_record()]
        unanswered[0].resent = True
        worker = self.workers[place]
        worker.write(unanswered)
        worker.answered = [one for one in worker.answered if one is not unanswered[0]]
        self.note_answers()
        if self.fsync != "always":
            self.left_unsynced.update(worker.unclosed())
        torn = self.new_record().raw
        worker.kill(torn[: self.rng.randrange(len(torn))] if self.rng.random() < 0.5 else b"")
        self.workers[place] = Worker(self.spool, self.fsync)
        self.excuse_what_is_gone()  # what waited in memory for a disk that failed
        self.workers[1 - place].write(unanswered)
        unanswered[0].held_up = unanswered[0].raw in self.workers[1 - place].in_memory()
        self.note_answers()

    async def power_loss(self) -> None:
        self.disk.crashed = True
        for worker in self.workers:
            worker.kill(b"")
        await self.end_delivery()
        self.disk.power_loss()
        left = self.in_segments() + self.disk.removed_by_delivery
        gone = [
            one.ids for one in self.accepted if one.raw in self.synced - self.excused and one.raw not in left
        ]
        assert not gone, f"the power loss took what was synced: {gone}"
        self.left_unsynced.clear()
        self.may_lose = True
        self.workers = [Worker(self.spool, self.fsync), Worker(self.spool, self.fsync)]
        self.excuse_what_is_gone()
        await self.restart()

    async def flip_a_byte(self) -> None:
        self.may_lose = self.disk.flip() or self.may_lose
        self.excuse_what_is_gone()

    async def remove_a_segment(self) -> None:
        paths = sorted(self.spool.glob(f"queues/*/*{SUFFIX}"))
        if paths and self.rng.random() < 0.5:
            path = self.rng.choice(paths)
            content = path.read_bytes()
            os.remove(path)  # noqa: PTH107 - not through the patched one
            self.may_lose = True
            # What a worker that has it open writes to it from now on is not excused.
            self.excused.update(one.raw for one in self.accepted if one.raw in content)
            for worker in self.workers:
                worker.write([self.new_record() for _ in range(3)])
            self.note_answers()

    def excuse_what_is_gone(self) -> None:
        synced = self.in_synced_segments() + self.disk.removed_by_delivery
        self.synced = {raw for raw in self.synced if raw in synced}
        content = self.in_segments()
        content += b"".join(worker.in_removed_files() for worker in self.workers)
        content += self.disk.removed_by_delivery  # for good: not even a power loss may take that back
        in_memory = b"".join(worker.in_memory() for worker in self.workers)
        self.excused.update(one.raw for one in self.accepted if one.raw not in content + in_memory)

    # The delivery process

    def start(self) -> None:
        self.delivery = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        books = await _open_books(self.spool)
        written = self.clock.elapsed + START
        clock = SteadyClock(written, wall=self.clock.time, elapsed=self.clock.monotonic)
        retention = Retention(age=self.retention, resend_window=self.resend_window)
        options = DeliveryOptions(self.spool, retention, max_age=self.max_age)
        await SpoolDelivery(options, books, clock).run()

    async def end_delivery(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def restart(self) -> None:
        self.disk.crashed = True
        await self.end_delivery()
        self.disk.crashed, self.disk.steps_to_crash = False, None
        self.start()

    async def finish(self) -> None:
        """Everything works again: in the end nothing waits."""
        await self.all_is_well()
        self.disk.steps_to_crash = None
        for _ in range(50):
            await self.tick()
        for worker in self.workers:
            self.note_saved(worker)
            worker.close()
        self.note_answers()
        for _ in range(3):
            for _ in range(80):
                await asyncio.sleep(0.75)
                assert self.delivery is not None
                if self.delivery.done():
                    error = self.delivery.exception()
                    assert isinstance(error, CrashError | type(None)), repr(error)
                    await self.restart()
                if self.at_rest():
                    await self.end_delivery()
                    self.check_outcome()
                    return
            await self.restart()
        raise AssertionError(f"something waits for ever: {self.counts()}")

    # What must hold

    def counts(self) -> dict[str, Counts]:
        with closing(sqlite3.connect(self.spool / FILE)) as db:
            return _counts(db)

    def at_rest(self) -> bool:
        if any(total(counts, "waiting") for counts in self.counts().values()):
            return False
        with closing(sqlite3.connect(self.spool / FILE)) as db:
            positions = {
                row[:2]: row[2] for row in db.execute("SELECT queue, segment, accounted FROM positions")
            }
            (replays,) = db.execute("SELECT count(*) FROM dead_letters WHERE replay").fetchone()
        files = list(queues_directory(self.spool).glob(f"*/*{SUFFIX}"))
        return not replays and all(
            positions.get((path.parent.name, path.name), 8) >= path.stat().st_size for path in files
        )

    def check_books(self, db: sqlite3.Connection) -> None:
        """The books hold after each commit: equations, ledger and dead letters."""
        counts = _counts(db)
        for queue, numbers in counts.items():
            assert violations(numbers) == [], (queue, numbers)
            assert total(numbers, "violations") == 0
        for queue, *sums in db.execute(
            "SELECT queue, sum(accepted), sum(delivered), sum(dead_lettered), sum(lost) FROM ledger"
            " GROUP BY queue"
        ):
            names = ("events", "delivered", "dead_lettered", "lost_events")
            assert sums == [total(counts[queue], name) for name in names], (queue, sums, counts[queue])
        for queue, number in db.execute("SELECT queue, count(*) FROM dead_letters GROUP BY queue"):
            assert number == total(counts[queue], "dead_lettered")
        if not self.may_lose:
            for queue, segment, stop in db.execute("SELECT queue, segment, stop FROM damage"):
                path = queues_directory(self.spool) / queue / segment
                assert not path.exists() or stop == path.stat().st_size, f"half a record within {path}"

    def check_requests(self, db: sqlite3.Connection) -> None:
        """Each request is in the books once, as what became of it; only where each has its own subject."""
        rows = db.execute("SELECT subject, accepted, delivered, dead_lettered, lost FROM ledger")
        lines = {subject: numbers for subject, *numbers in rows}
        for one in self.accepted:
            if not one.ids or one.resent or one.saved:
                continue  # counted twice where the first copy is not known any more
            accepted, delivered, dead, lost = lines.get(one.subject, (0, 0, 0, 0))
            assert accepted in (0, len(one.ids)), (one.ids, accepted)
            assert delivered + dead + lost == accepted, (one.ids, accepted, delivered, dead, lost)
            if one.raw not in self.excused:
                assert not lost, f"{one.ids} are counted as lost, but their bytes never were"

    def check_outcome(self) -> None:
        """What was acknowledged is delivered once in effect, or a dead letter, or counted as lost."""
        counts = sum(self.counts().values(), Counter())
        with closing(sqlite3.connect(self.spool / FILE)) as db:
            self.check_books(db)
            dead = {orjson.loads(event)["id"] for (event,) in db.execute("SELECT event FROM dead_letters")}
        stored = set(self.api.stored)
        set_aside = b"".join(path.read_bytes() for path in self.spool.glob("queues/*/*.unreadable"))
        self.excused.update(one.raw for one in self.accepted if one.raw in set_aside)
        self.may_lose = self.may_lose or bool(set_aside)
        if self.own_subjects:
            with closing(sqlite3.connect(self.spool / FILE)) as db:
                self.check_requests(db)
        missing = [one for one in self.accepted if one.ids and not set(one.ids) <= stored | dead]
        missing = [one for one in missing if one.raw not in self.excused]
        unexplained = [one for one in missing if not one.saved and not (one.resent and self.may_lose)]
        # Delivery may have read in the removed file what was copied out of it. The copy then is a resent
        # request, and if the file is gone at the next start, its events are counted as lost.
        saved = sum(len(one.ids) for one in missing if one.saved)
        assert saved <= total(counts, "lost_events"), [one.ids for one in missing if one.saved]
        # Which requests did not fit into memory while the disk refused them is not known, but how many.
        assert len(unexplained) <= total(counts, "lost"), [one.ids for one in unexplained]
        delivered, lost = total(counts, "delivered"), total(counts, "lost_events")
        if not self.may_lose:
            assert lost == 0
            # A resent request is recognised by what was read since the start and by the segments that exist.
            # Where neither is left (short retention, a restart, a disk that refused the copy for longer than
            # the resend window), it is sent and counted again; the metering API knows its ids.
            short = self.retention < timedelta(days=1)
            late = self.resend_window < RESEND_WINDOW
            twice = [one for one in self.accepted if one.held_up or (one.resent and late)]
            again = sum(len(one.ids) for one in twice) if short else 0
            assert 0 <= delivered - len(stored - dead) <= again, (delivered, len(stored), len(dead))
        else:
            again = sum(len(one.ids) for one in self.accepted if one.resent or one.saved)
            assert delivered <= len(stored) + again, (delivered, len(stored))
            damaged = [one for one in self.accepted if one.raw in self.excused or one.resent or one.saved]
            assert len(stored - dead) - delivered <= sum(len(one.ids) for one in damaged)
        if self.max_age is not None and not self.may_lose:
            assert dead <= self.api.bad | self._once_bad(dead), "grown too old by a clock that jumped"
        self.outcome.events, self.outcome.delivered = total(counts, "events"), delivered
        self.outcome.dead, self.outcome.lost = len(dead), lost
        self.outcome.excused = len(self.excused)

    def _once_bad(self, dead: set[str]) -> set[str]:
        """Return the dead letters that the API refused: those that grew too old have no status."""
        with closing(sqlite3.connect(self.spool / FILE)) as db:
            rows = db.execute("SELECT event FROM dead_letters WHERE status IS NOT NULL")
            return {orjson.loads(event)["id"] for (event,) in rows} & dead


def _counts(db: sqlite3.Connection) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    for queue, name, reason, value in db.execute("SELECT queue, name, reason, value FROM counts"):
        counts.setdefault(queue, Counter())[name, reason] = value
    return counts


def simulate(seed: int) -> Outcome:
    """Run the history of this seed; raises AssertionError if a promise is broken."""
    random.seed(seed)  # the breaker's jitter
    with tempfile.TemporaryDirectory(dir=_memory()) as directory:
        history = History(seed, Path(directory))
        with ExitStack() as stack:
            stack.enter_context(structlog.testing.capture_logs())
            stack.enter_context(patch.object(writer_module, "SLOW_WRITE", 1e9))
            # Names of segments decide their order.
            stack.enter_context(patch.object(spool_queue._numbers, "following", 10_000))
            stack.enter_context(patch.object(os, "getpid", lambda: 4711))
            stack.enter_context(patch.object(pipeline, "POLL", 0.25))  # fewer idle rounds
            for part in (history.clock, history.disk, history.api):
                stack.enter_context(part.in_use())
            loop = new_loop(history.clock)
            loop.set_exception_handler(lambda *_: None)
            try:
                loop.run_until_complete(history.run())
            finally:
                history.disk.crashed = True
                loop.run_until_complete(history.end_delivery())
                loop.close()
        return history.outcome


def _memory() -> str | None:
    """Return a folder in memory, where SQLite is quick; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
