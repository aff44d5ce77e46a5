"""Three syncd as processes on a real PostgreSQL, each with a proxy of its own before one metering API.

The proxies know who writes when. A round changes the consumers, asks a random syncd for a run, and kills or
freezes the leader at a random moment; then it checks what was promised (`Cluster.round`).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from syncd.runs.history import History
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.harness.ports import free_port
from tests.syncd.processes import command, environment

T = TypeVar("T")

SIZE = 3
TAKEOVER_SECONDS = 15.0
_SYNC_SECONDS = 60.0
_NEW_CONSUMERS = 40
_WRITE_SECONDS = 0.12
_STRANGERS = 5
_READING = frozenset({"GET", "HEAD"})


class PromiseBroken(Exception):
    """What went wrong in a round."""


@dataclass(frozen=True, slots=True)
class Write:
    """A request that may change something, on its way from a syncd to the metering API."""

    who: int
    arrived: float
    answered: float
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """A round that held."""

    kind: str
    takeover: float
    cut_off: bool
    writes_before: int


@dataclass
class Node:
    """One syncd: its process, while it runs."""

    number: int
    folder: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command("run"), cwd=self.folder, env=environment(), stderr=log, text=True
            )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def status(self) -> Mapping[str, Any] | None:
        try:
            answer = httpx.get(f"{self.url}/v1/status", timeout=2)
        except httpx.HTTPError:
            return None
        found: Mapping[str, Any] = answer.json()
        return found

    def leads(self) -> bool:
        status = self.status()
        return status is not None and bool(status["leads"])


@dataclass
class Cluster:
    """The processes and what they have written."""

    folder: Path
    metering: str
    database: str
    random: random.Random
    nodes: list[Node] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write_consumers(self, new: int) -> None:
        self.consumers += [f"consumer-{len(self.consumers) + number:05}" for number in range(new)]
        document = {"_format_version": "3.0", "consumers": [{"username": name} for name in self.consumers]}
        whole = self.folder / "kong.new"
        whole.write_text(yaml.safe_dump(document))
        whole.rename(self.folder / "kong.yml")

    def leader(self, among: list[Node], seconds: float = TAKEOVER_SECONDS) -> Node:
        return waited(lambda: next((node for node in among if node.leads()), None), "a leader", seconds)

    def synced(self) -> bool:
        found = self.customers()
        return all(name in found for name in self.consumers)

    def customers(self) -> dict[str, dict[str, Any]]:
        found, page = {}, 1
        while True:
            params: dict[str, str | int] = {"page": page, "pageSize": 500}
            items = httpx.get(f"{self.metering}/api/v1/customers", params=params, timeout=20).json()["items"]
            found.update({item["key"]: item for item in items})
            if len(items) < 500:
                return found
            page += 1

    def round(self) -> Report:
        """Kill or freeze the leader once; raises PromiseBroken."""
        leader = self.leader(self.nodes)
        others = [node for node in self.nodes if node is not leader]
        before = len(self.writes)
        strangers, known = self.strangers(), {run["id"] for run in self.runs()}
        self.write_consumers(_NEW_CONSUMERS)
        self.ask_for_a_run()
        time.sleep(self.random.uniform(0, 2.5))
        kind = self.random.choice(("SIGKILL", "SIGSTOP"))
        leader.signal(signal.Signals[kind])
        struck = time.monotonic()
        done = len(self.writes) - before
        if kind == "SIGKILL":
            leader.kill()
        new = self.leader(others)
        takeover = time.monotonic() - struck
        if kind == "SIGSTOP":
            time.sleep(self.random.uniform(0, 4))
            leader.signal(signal.SIGCONT)
        waited(partial(self.has_synced, new, known), "the run of the new leader", _SYNC_SECONDS)
        if kind == "SIGKILL":
            leader.start()
        waited(partial(is_up, leader), "the struck syncd", _SYNC_SECONDS)
        waited(partial(self.is_quiet, new), "the end of all runs", _SYNC_SECONDS)
        self.check_writes(new, leader, struck)
        if self.strangers() != strangers:
            raise PromiseBroken("customers that syncd does not own were changed")
        self.check_customers()
        return Report(kind, takeover, self.cut_off(known), done)

    def ask_for_a_run(self) -> None:
        asked = self.random.choice(self.nodes)
        answer = httpx.post(f"{asked.url}/v1/syncs", json={}, timeout=10)
        if answer.status_code != 202:
            raise PromiseBroken(f"a run was refused with {answer.status_code}: {answer.text}")

    def has_synced(self, leader: Node, known: set[str]) -> bool:
        """Return whether a run of this round has succeeded, and every consumer has its customer."""
        new = [run for run in self.runs() if run["id"] not in known]
        succeeded = any(run["state"] == "succeeded" for run in new)
        return succeeded and self.is_quiet(leader) and self.synced()

    def is_quiet(self, leader: Node) -> bool:
        status = leader.status()
        idle = status is not None and status["leads"] and status["state"] == "idle"
        return bool(idle) and not any(run["state"] == "running" for run in self.runs())

    def runs(self) -> list[dict[str, Any]]:
        with State(StateLocation(self.folder, self.database)) as state:
            return History(state).runs(20)

    def cut_off(self, known: set[str]) -> bool:
        """Return whether a run of this round is recorded as cut off."""
        words = ("interrupted", "may no longer write", "was closed by another", "another syncd does")
        new = [run for run in self.runs() if run["id"] not in known]
        return any(run["error"] and any(word in run["error"] for word in words) for run in new)

    def check_writes(self, new: Node, old: Node, struck: float) -> None:
        """Check that no write arrived while another syncd wrote, or after its successor had begun."""
        with self.lock:
            writes = sorted((one for one in self.writes if one.answered >= struck - 10), key=arrived)
        begun = next((one.arrived for one in writes if one.who == new.number and one.arrived > struck), None)
        late = [one for one in writes if begun and one.who == old.number and one.arrived >= begun]
        if late:
            raise PromiseBroken(f"the old leader wrote after the new one had begun: {late[:3]}")
        for earlier, later in pairwise(writes):
            if earlier.who != later.who and later.arrived < earlier.answered:
                raise PromiseBroken(f"two writers at a time: {earlier} and {later}")

    def check_customers(self) -> None:
        found = self.customers()
        subjects: dict[str, str] = {}
        for key, customer in found.items():
            for subject in (customer.get("usageAttribution") or {}).get("subjectKeys", ()):
                if subject in subjects:
                    raise PromiseBroken(f"{subject} is billed to {subjects[subject]} and {key}")
                subjects[subject] = key
        missing = [name for name in self.consumers if name not in found]
        extra = [key for key in found if key not in self.consumers and not key.startswith("stranger")]
        if missing or extra:
            raise PromiseBroken(f"missing customers: {missing[:3]}, unexpected ones: {extra[:3]}")

    def strangers(self) -> dict[str, Any]:
        return {key: one for key, one in self.customers().items() if key.startswith("stranger")}


def is_up(node: Node) -> bool:
    return node.status() is not None


def arrived(write: Write) -> float:
    return write.arrived


def waited(probe: Callable[[], T | None], what: str, seconds: float) -> T:
    """Poll until the probe returns something true; raises PromiseBroken after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        if result := probe():
            return result
        if time.monotonic() >= deadline:
            raise PromiseBroken(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.05)


@contextmanager
def running_cluster(folder: Path, metering: str, database: str, seed: int) -> Iterator[Cluster]:
    """Start the processes; `metering` is a sandbox, and `database` an empty one."""
    cluster = Cluster(folder, metering, database, random.Random(seed))
    cluster.write_consumers(_NEW_CONSUMERS)
    for number in range(_STRANGERS):
        body = {"key": f"stranger-{number}", "name": "not syncd's"}
        httpx.post(
            f"{metering}/api/v1/customers",
            json={**body, "usageAttribution": {"subjectKeys": [f"stranger-{number}"]}},
        ).raise_for_status()
    with ExitStack() as stack:
        for number in range(SIZE):
            url = stack.enter_context(_recording(cluster, number))
            node = Node(number, folder / f"syncd-{number}", free_port())
            node.folder.mkdir()
            settings = {
                "sources": [{"type": "declarative-file", "path": str(folder / "kong.yml")}],
                "mapping": {"key": "{username}"},
                "metering": {"url": url, "concurrency": 4},
                "schedule": {"interval": "1h"},
                "daemon": {"listen": f"127.0.0.1:{node.port}", "state_url": database},
            }
            (node.folder / "syncd.yaml").write_text(yaml.safe_dump(settings))
            cluster.nodes.append(node)
            node.start()
            stack.callback(node.kill)
        for node in cluster.nodes:
            waited(partial(is_up, node), "syncd", _SYNC_SECONDS)
        waited(cluster.synced, "the first run", _SYNC_SECONDS)
        waited(partial(cluster.is_quiet, cluster.leader(cluster.nodes)), "its end", _SYNC_SECONDS)
        yield cluster


@contextmanager
def _recording(cluster: Cluster, number: int) -> Iterator[str]:
    """Proxy that records the writes of one syncd, and takes its time for each."""
    upstream = httpx.Client(base_url=cluster.metering, timeout=30)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536

        def _handle(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            content = self.rfile.read(length)
            if len(content) < length:  # cut off by the end of its process
                self.close_connection = True
                return
            begun = time.monotonic()
            if self.command not in _READING:
                time.sleep(_WRITE_SECONDS)
            headers = {"Content-Type": self.headers.get("content-type") or "application/json"}
            answer = upstream.request(self.command, self.path, content=content, headers=headers)
            if self.command not in _READING:
                with cluster.lock:
                    what = f"{self.command} {self.path}"
                    cluster.writes.append(Write(number, begun, time.monotonic(), what))
            try:
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("content-type", ""))
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)
                self.wfile.flush()
            except OSError:
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a connection that ended with its process

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        upstream.close()
