"""A node of Kong for the gate's Lua half: workers under lupa's LuaJIT that share a dict, in virtual time.

`Node` runs either shell: the plugin `openmeter-gate`, or its text in the sandbox of post-function. The peer
of its sockets is any `Peer`: a scripted one in this process, or `UnixPeer`, a real socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from lupa import luajit21

from openmeter_plugin.config.gate_lua import FOLDER, gate_files, post_function

Value = Any
Shell = Literal["plugin", "post-function"]
SHELLS: Final[tuple[Shell, ...]] = ("plugin", "post-function")
SOCKET: Final = "/run/openmeter/gate.sock"
_STAND_IN: Final = Path(__file__).with_name("nginx.lua")
_FILES: Final = gate_files()


class Peer(Protocol):
    """What a node's sockets are connected to."""

    def connect(self, address: str) -> Link | None:
        """Return a connection, or None if it is refused."""


class Link(Protocol):
    """One connection."""

    def send(self, data: bytes) -> bool:
        """Take bytes; False if the connection is closed."""

    def receive(self, size: int, exact: bool) -> bytes | Literal[False] | None:
        """Return bytes, False if the connection is closed, None if there is nothing yet."""

    def close(self) -> None:
        """Close it."""


@dataclass
class Request:
    """An HTTP request that the node sent."""

    method: str
    path: str
    query: dict[str, str]
    body: str


@dataclass
class Answer:
    """What a client of Kong got. `mark` is what Kong's log of the request says."""

    status: int
    reason: str | None = None
    message: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    mark: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the request reached its service."""
        return self.status == 200


class Node:
    """Workers of one Kong, their dict and their clock."""

    def __init__(
        self,
        peer: Peer,
        *,
        workers: int = 2,
        shell: Shell = "plugin",
        entries: int | None = 10_000,
        path: str = SOCKET,
        now: float = 1_800_000_000.0,
        **config: Value,
    ) -> None:
        self.peer = peer
        self.shell = shell
        self.entries = entries
        self.config = {"socket": path, **config}
        self.runtime = luajit21.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self.globals = self.runtime.globals()
        python: dict[bytes, Callable[..., Value]] = {
            b"connect": lambda address: self.peer.connect(address.decode()),
            b"send": lambda link, data: link.send(data),
            b"receive": lambda link, size, exact: link.receive(int(size), exact),
            b"close": lambda link: link.close(),
        }
        self.runtime.execute(_STAND_IN.read_bytes(), self.runtime.table_from(python))
        self.now = now
        self._accesses: list[Value] = []
        self.workers: list[Value] = []
        self.old: list[Value] = []
        self.dict: Value = None
        self.restart(workers)

    # Kong

    def restart(self, workers: int | None = None) -> None:
        """Start Kong anew: the dict is empty."""
        self.dict = None if self.entries is None else self.globals[b"new_dict"](self.entries)
        self.old, count = [], workers or len(self.workers)
        self.workers, self._accesses = [], []
        for number in range(count):
            self._start(number)

    def reload(self) -> None:
        """Start new workers on the same dict; the old ones finish what they do."""
        for worker in self.workers:
            worker[b"exiting"] = True
        self.old += self.workers
        count = len(self.workers)
        self.workers, self._accesses = [], []
        for number in range(count):
            self._start(number)

    def kill(self, number: int) -> None:
        """Kill a worker, in whose place nginx starts another one."""
        workers, accesses = self.workers, self._accesses
        self.workers, self._accesses = [], []
        self._start(number)
        workers[number], accesses[number] = self.workers[0], self._accesses[0]
        self.workers, self._accesses = workers, accesses

    def configure(self, **config: Value) -> None:
        """Change the configuration in Kong; every worker takes it over."""
        self.config |= config
        for number, worker in enumerate(self.workers):
            self._accesses[number] = self._access(worker, number)

    def _start(self, number: int) -> None:
        worker = self.globals[b"new_worker"](number, self.dict)
        self.workers.append(worker)
        self._accesses.append(self._access(worker, number))

    def _access(self, worker: Value, number: int) -> Value:
        if self.shell == "post-function":
            text = post_function(
                self.config["socket"], self.config.get("mode"), self.config.get("features", ())
            )
            return self.globals[b"compiled"](text.encode(), self.globals[b"sandbox"](worker))()
        prefix = FOLDER.replace("/", ".")
        sources = {f"{prefix}.{name.removesuffix('.lua')}": text for name, text in _FILES.items()}
        handler = worker[b"handler"]
        if handler is None:
            env = self.globals[b"plugin_environment"](worker, self.lua(sources))
            handler = worker[b"handler"] = env[b"require"](f"{prefix}.handler".encode())
        config = self.lua(self.config)
        handler[b"configure"](handler, self.runtime.table_from([config]))
        bind = self.runtime.eval(
            b"function(handler, config) return function() handler:access(config) end end"
        )
        return bind(handler, config)

    # Requests

    def request(
        self,
        consumer: str | None = "alice",
        *,
        worker: int = 0,
        on_route: str = "api",
        headers: dict[str, str] | None = None,
        query: dict[str, Value] | None = None,
        **ctx: Value,
    ) -> Answer:
        """Serve a request and return what its client got."""
        known: dict[str, Value] = {"route": {"id": f"id-of-{on_route}", "name": on_route}}
        if consumer is not None:
            known["authenticated_consumer"] = {"id": f"id-of-{consumer}", "username": consumer}
            known["authenticated_credential"] = {"id": "key"}
        shared = ctx.pop("shared", {})
        sent = {name.lower(): value for name, value in (headers or {}).items()}
        described = {
            "ctx": {name: value for name, value in (known | ctx).items() if value is not None},
            "var": {f"http_{name.replace('-', '_')}": value for name, value in sent.items()},
            "headers": sent,
            "query": query or {},
            "shared": shared,
        }
        found, kept, marks = self.workers[worker][b"serve"](self.lua(described), self._accesses[worker])
        mark = marks[b"openmeter_gate"]
        mark = None if mark is None else mark.decode()
        if found is None:
            return Answer(200, headers=_texts(kept), mark=mark)
        body = _texts(found[b"body"])
        return Answer(found[b"status"], body["reason"], body["message"], _texts(found[b"headers"]), mark)

    # Time

    @property
    def now(self) -> float:
        """The time in Kong."""
        return float(self.globals[b"clock"][b"now"])

    @now.setter
    def now(self, value: float) -> None:
        self.globals[b"clock"][b"now"] = value

    def turn(self) -> float | None:
        """Let every worker do what is due; returns when something is due next."""
        workers = [worker for worker in (*self.workers, *self.old) if not worker[b"stopped"]]
        found = [self.globals[b"turn"](worker) for worker in workers]
        return min((due for due in found if due is not None), default=None)

    def run(self, seconds: float) -> None:
        """Let this time pass."""
        end = self.now + seconds
        while (due := self.turn()) is not None and due <= end:
            self.now = max(due, self.now)
        self.now = end
        self.turn()

    @property
    def threads(self) -> list[int]:
        """How many loops each worker has."""
        return [len(worker[b"threads"]) for worker in self.workers]

    @property
    def said(self) -> list[str]:
        """What the workers wrote to Kong's error log."""
        return [line.decode() for worker in self.workers for line in worker[b"said"].values()]

    def get(self, key: str) -> Value:
        """Return a value of the dict."""
        found = self.dict[b"get"](self.dict, key.encode())
        return found[0] if isinstance(found, tuple) else found

    # Values

    def lua(self, value: Value) -> Value:
        """Return a value as Lua has it: text as bytes."""
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict):
            return self.runtime.table_from(
                {self.lua(name): self.lua(member) for name, member in value.items()}
            )
        if isinstance(value, list | tuple):
            return self.runtime.table_from([self.lua(item) for item in value])
        return value


def _texts(table: Value) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in table.items()}


class UnixPeer(ExitStack):
    """Real Unix sockets."""

    def connect(self, address: str) -> UnixLink | None:
        """Connect."""
        link = self.enter_context(socket.socket(socket.AF_UNIX))
        link.settimeout(5)
        try:
            link.connect(address.removeprefix("unix:"))
        except OSError:
            link.close()
            return None
        return UnixLink(link)


class UnixLink:
    """A connected Unix socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._got = b""

    def send(self, data: bytes) -> bool:
        """Send all."""
        try:
            self._link.settimeout(5)
            self._link.sendall(data)
        except OSError:
            return False
        return True

    def receive(self, size: int, exact: bool) -> bytes | Literal[False] | None:
        """Return what there is, or exactly this much, once it is there."""
        self._link.settimeout(0.01)
        with suppress(TimeoutError):
            while len(self._got) < size and (exact or not self._got):
                try:
                    part = self._link.recv(65_536)
                except ConnectionError:
                    part = b""
                if not part:
                    return False
                self._got += part
        if not self._got or (exact and len(self._got) < size):
            return None
        taken, self._got = self._got[:size], self._got[size:]
        return taken

    def close(self) -> None:
        """Close it."""
        self._link.close()
