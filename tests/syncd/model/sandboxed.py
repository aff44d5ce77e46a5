"""The sandbox without sockets: requests are calls, times and ids are counted, and old states can be read.

Thousands of runs in a minute need that; the application and its database are those that a server serves.
"""

from __future__ import annotations

import atexit
import json
import shutil
import sqlite3
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

from syncd.sandbox.api.app import create_app
from syncd.sandbox.settings import Settings
from syncd.sandbox.store import billing, customers, meters, subjects
from syncd.sandbox.store.database import Database

_KEPT_STATES = 4


@dataclass
class Reply:
    """An answer; headers have lower-case names."""

    status: int
    body: bytes
    headers: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class LaggingDatabase(Database):
    """A database with replicas: `behind` says how many writes ago a reader sees it, 0 for now."""

    def __init__(self, path: Path) -> None:
        self.behind = 0
        self.version = 0
        self._states: deque[tuple[int, sqlite3.Connection]] = deque()
        self._keeps_states = False
        super().__init__(path)
        self._keeps_states = True  # from here on in WAL mode, in which readers do not stop writers

    def catch_up(self) -> None:
        """Let all replicas see the present state."""
        while self._states:
            self._release(self._states.popleft()[1])

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        if self._keeps_states:
            self._keep_state()
        with super().writing() as connection:
            yield connection
        self.version += 1

    def _keep_state(self) -> None:
        kept = self._connect()
        kept.execute("BEGIN")
        kept.execute("SELECT count(*) FROM customers").fetchone()  # takes the snapshot
        self._states.append((self.version, kept))
        while len(self._states) > _KEPT_STATES:
            self._release(self._states.popleft()[1])

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        if self.behind and self._states:
            yield self._states[-min(self.behind, len(self._states))][1]
            return
        with super().reading() as connection:
            yield connection

    def version_read(self) -> int:
        """Return the version that a reader sees now."""
        if self.behind and self._states:
            return self._states[-min(self.behind, len(self._states))][0]
        return self.version

    def close(self) -> None:
        self.catch_up()
        super().close()

    @staticmethod
    def _release(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")
        connection.close()


class _Ticks:
    """Ids and times of the server, which only ever grow: the same calls give the same ones again."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._count = 0

    def ulid(self) -> str:
        self._count += 1
        return f"01{self._count:024d}"

    def now_rfc3339(self, *, plus: float = 0) -> str:
        self._count += 1
        moment = self._now() + timedelta(milliseconds=self._count, seconds=plus)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Sandboxed:
    """One sandbox; safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        folder = tempfile.mkdtemp(prefix="syncd-model-")
        with patch("syncd.sandbox.api.app.Database", LaggingDatabase):
            self._app = create_app(Settings(db=Path(folder) / "sandbox.sqlite3"))
        api: Any = self._app._api
        self.database: LaggingDatabase = api.state.database
        atexit.register(shutil.rmtree, folder)
        atexit.register(self.database.close)

    @contextmanager
    def emptied(self, now: Callable[[], datetime]) -> Iterator[None]:
        """Start anew, with this clock; its calls are allowed until the end of the `with` only."""
        with _fixed_chance(now):
            self.database.behind = 0
            self.database.empty()
            with self.database.writing() as connection:
                meters.create_standard_meters(connection)
            self.database.catch_up()
            yield

    def call(self, method: str, target: str, body: bytes = b"") -> Reply:
        """Send a request; `target` is path and query, percent-encoded."""
        path, _, query = target.partition("?")
        scope: MutableMapping[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"sandbox"), (b"content-type", b"application/json")],
            "client": ("client", 1),
            "server": ("sandbox", 80),
            "state": {},
        }
        reply = Reply(0, b"")

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], dict(message["headers"])
            else:
                reply.body += message.get("body", b"")

        with self._lock:
            answering = self._app(scope, receive, send)
            try:
                answering.send(None)
            except StopIteration:
                return reply
            raise AssertionError("a handler of the sandbox waits for something")


@contextmanager
def _fixed_chance(now: Callable[[], datetime]) -> Iterator[None]:
    """Count ids and times, and run the handlers in the thread that calls."""
    ticks = _Ticks(now)

    async def directly(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with ExitStack() as stack:
        for module in (customers, billing, subjects, meters):
            for name in ("ulid", "now_rfc3339"):
                stack.enter_context(patch.object(module, name, getattr(ticks, name)))
        for where in ("fastapi.routing", "fastapi.dependencies.utils"):
            stack.enter_context(patch(f"{where}.run_in_threadpool", directly))
        yield
