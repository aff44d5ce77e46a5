"""What surrounds the product in a simulation: a disk that fails and loses power, and a metering API."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson

from openmeter_plugin.books import store
from openmeter_plugin.books.database import FILE
from openmeter_plugin.delivery import endpoint
from openmeter_plugin.delivery.answers import RejectedError, UnauthorizedError, UndeliveredError
from openmeter_plugin.spool.destination import Destination
from openmeter_plugin.spool.segment import SUFFIX
from tests.plugin.spools import file_of


class CrashError(BaseException):
    """The delivery process was killed at this step."""


class Disk:
    """The disk under a spool. It knows what a power loss would leave."""

    def __init__(self, spool: Path, rng: random.Random) -> None:
        self.spool = spool
        self._rng = rng
        self.refusing: int | None = None
        """Errno with which writes of segments fail, some of them after a part."""
        self.unreadable = False
        self.books_fail = False
        self.steps_to_crash: int | None = None
        self.crashed = False
        self._synced: dict[Path, int] = {}  # bytes of segments that a power loss leaves
        self._listed: set[Path] = set()  # segments whose directory entry is on the disk
        self.removed_by_delivery = b""
        """What was in the segments that delivery removed."""
        self._removed: dict[Path, bytes] = {}  # segments whose removal is not on the disk yet
        self._books: list[dict[str, bytes]] = []  # after each commit that may be taken back
        self._checkpointed: bytes | None = None
        self._refused = False
        self.on_commit: Callable[[sqlite3.Connection], None] = lambda _: None

    def step(self) -> None:
        """Take one step of the delivery process, which may be its last."""
        if self.steps_to_crash is not None:
            self.steps_to_crash -= 1
            if self.steps_to_crash < 0:
                self.crashed, self.steps_to_crash = True, None
        if self.crashed:
            raise CrashError

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the product use this disk."""
        with ExitStack() as stack:
            for name in ("write", "pread", "fdatasync", "fsync", "unlink"):
                stack.enter_context(
                    patch.object(os, name, self._over(getattr(os, name), getattr(self, f"_{name}")))
                )
            stack.enter_context(patch.object(store, "transaction", self._transaction))
            yield

    def power_loss(self) -> None:
        """Lose what was not synced: bytes are gone, zeros or garbage, files and commits back or gone."""
        rng = self._rng
        for path in sorted(self.spool.glob(f"queues/*/*{SUFFIX}")):
            if path not in self._listed and rng.random() < 0.5:
                os.remove(path)  # noqa: PTH107 - not through the patched one
                continue
            content = path.read_bytes()
            synced = self._synced.get(path, 0)
            kept = rng.randint(synced, len(content))
            tail = content[kept:]
            fate = rng.choice(["cut", "zeros", "garbage"])
            if fate == "zeros":
                path.write_bytes(content[:kept] + bytes(len(tail)))
            elif fate == "garbage":
                path.write_bytes(content[:kept] + rng.randbytes(len(tail)))
            else:
                path.write_bytes(content[:kept])
        for path, content in self._removed.items():
            if rng.random() < 0.5:
                path.write_bytes(content)
        self._removed.clear()
        if self._books:
            files = rng.choice(self._books)
            for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
                (self.spool / name).unlink(missing_ok=True)
            for name, content in files.items():
                (self.spool / name).write_bytes(content)
            self._books = [files]
        for path in self.spool.glob(f"queues/*/*{SUFFIX}"):
            self._synced[path] = path.stat().st_size
            self._listed.add(path)

    def flip(self) -> bool:
        """Damage a byte of some segment; returns whether there was one."""
        paths = [p for p in sorted(self.spool.glob(f"queues/*/*{SUFFIX}")) if p.stat().st_size > 20]
        if not paths:
            return False
        path = self._rng.choice(paths)
        at = self._rng.randrange(8, path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes((byte ^ 0x55,)))
        return True

    def _over(self, real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: ours(real, *arguments, **options)

    def _write(self, real: Callable[..., int], descriptor: int, data: Any) -> int:
        if self.refusing is not None and file_of(descriptor).parent.parent.name == "queues":
            part = self._rng.choice([0, 0, len(data) // 2])
            if not part or self._refused:
                self._refused = False
                raise OSError(self.refusing, os.strerror(self.refusing))
            self._refused = True
            return real(descriptor, memoryview(data)[:part])
        return real(descriptor, data)

    def _pread(self, real: Callable[..., bytes], descriptor: int, size: int, offset: int) -> bytes:
        self.step()
        if self.unreadable and self._rng.random() < 0.3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, offset)

    def _fdatasync(self, real: Callable[..., None], descriptor: int) -> None:
        path = file_of(descriptor)
        self._synced[path] = os.fstat(descriptor).st_size

    def _fsync(self, real: Callable[..., None], descriptor: int) -> None:
        path = file_of(descriptor)
        if path.name == f"{FILE}-wal":
            self.step()
            self._books = self._books[-1:]
        elif path.is_dir():
            self._listed.update(path.glob(f"*{SUFFIX}"))
            self._removed = {gone: content for gone, content in self._removed.items() if gone.parent != path}
        elif path.name.endswith(f"{SUFFIX}.{os.getpid()}.tmp"):  # written whole, and renamed after this
            self._synced[path.with_name(path.name[1:].rsplit(".", 2)[0])] = os.fstat(descriptor).st_size

    def _unlink(self, real: Callable[..., None], path: Any, **options: Any) -> None:
        if str(path).endswith(SUFFIX):
            self.step()
            if os.path.exists(path):  # noqa: PTH110
                self._removed[Path(path)] = Path(path).read_bytes()
                self.removed_by_delivery += self._removed[Path(path)]
        real(path, **options)

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """Commit, or fail, or be killed before or after it."""
        self.step()
        if self.books_fail and self._rng.random() < 0.5:
            raise sqlite3.OperationalError("database or disk is full")
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            self.step()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._note_commit()
        self.on_commit(db)
        self.step()

    def _note_commit(self) -> None:
        files = {name: (self.spool / name).read_bytes() for name in (FILE, f"{FILE}-wal")}
        if files[FILE] != self._checkpointed:  # a checkpoint syncs the journal first
            self._checkpointed = files[FILE]
            self._books.clear()
        self._books.append(files)


class MeteringApi:
    """The metering API and the network to it."""

    def __init__(self, rng: random.Random, step: Callable[[], None]) -> None:
        self._rng = rng
        self._step = step
        self.weather = "fine"
        self.stored: Counter[str] = Counter()
        self.bad: set[str] = set()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the product post to this API."""
        api = self

        class Client:
            tls = None

            def __init__(self, destination: Destination, network: object) -> None:
                self.destination = destination

            async def post(
                self, events: Sequence[bytes], written: asyncio.Future[None] | None = None
            ) -> None:
                await api.answer(events, written)

            async def close(self) -> None:
                pass

        with (
            patch.object(endpoint, "EventsClient", Client),
            patch.object(endpoint, "tls_of", lambda *_: None),
        ):
            yield

    async def answer(self, events: Sequence[bytes], written: asyncio.Future[None] | None) -> None:
        """Answer a POST as the weather is; raises DeliveryError."""
        rng = self._rng
        self._step()
        await asyncio.sleep(rng.uniform(0.0, 0.2))
        if written is not None and not written.done():
            written.set_result(None)
        self._step()
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        ids = [event["id"] for event in orjson.loads(b"[" + b",".join(events) + b"]")]
        bad = [position for position, name in enumerate(ids) if name in self.bad]
        kind = "fine" if self.weather == "fine" or rng.random() < 0.3 else self.weather
        if kind == "mixed":
            kind = rng.choice(["fine", "lost answer", "doubled", "503", "429", "401", "timeout", "cut"])
        if kind == "timeout":
            await asyncio.sleep(2.0)
            raise UndeliveredError("no answer in time", endpoint_fails=True)
        if kind == "503":
            raise UndeliveredError("HTTP 503", 503, endpoint_fails=True)
        if kind == "429":
            raise UndeliveredError("HTTP 429", 429, rng.uniform(0.0, 2.0))
        if kind == "401":
            raise UnauthorizedError("HTTP 401", 401)
        if kind == "cut":  # the server has taken a part, and the connection ends
            self.stored.update(name for name in ids[: rng.randint(0, len(ids))] if name not in self.bad)
            raise UndeliveredError("the connection was closed", endpoint_fails=True)
        if bad:
            named = bad if rng.random() < 0.7 else []
            raise RejectedError("it is bad", 400, named)
        self.stored.update(ids)
        if kind == "doubled":  # a proxy has sent it twice
            self.stored.update(ids)
        self._step()
        if kind == "lost answer":
            raise UndeliveredError("the answer was lost", endpoint_fails=True)
