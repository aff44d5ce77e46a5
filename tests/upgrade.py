"""``python -m tests.upgrade``: writes what this version leaves on disk to tests/data/upgrade/<version>.

Run it at a release and commit the folder: from then on tests/test_upgrade.py has every version go on with it.
The processes are real, and the plugin server ends by ``kill -9`` with events waiting:

- `spool`: delivered and waiting events, dead letters, a quarantine, skipped requests, and the books of that.
- `segments`: requests that Kong's half of the plugin in Lua has written and nothing has read yet.
- `state`: syncd's history after two runs, with the customers that they made.
- `expected.json`: what the next version has to find.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import yaml

from openmeter_plugin import __version__
from tests.demo.__main__ import TOKEN, running_sandbox
from tests.demo.gateway import KONG_YML
from tests.documents import ROOT
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.kong_segments import ENDPOINT, Worker, configuration, request_line
from tests.harness.process import eventually, plugin_server
from tests.harness.recordings import Recorded, serialized
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving

DATA: Final = ROOT / "tests" / "data" / "upgrade"
DELIVERED, REFUSED, WAITING, UNREAD = 5, 2, 4, 3
"""How many requests end how: at the metering API, as dead letters, in the spool, in Kong's segment."""


def numbered(name: str, number: int) -> Recorded:
    """Return a recorded request under an id of its own."""
    template = serialized(name)
    original = template.parsed["request"]["id"].encode()
    return Recorded(name, template.log.replace(original, f"{number:032x}".encode()))


def write(target: Path) -> None:
    """Write everything below a folder that is not there yet."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        expected = _spool(Path(folder), target) | _segments(target) | _state(Path(folder), target)
    (target / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


def _spool(folder: Path, target: Path) -> dict[str, Any]:
    events = EventsServer()
    with serving(events), plugin_server(folder) as server:
        asyncio.run(_requests(server.socket, events))
        for child in server.children():
            os.kill(child, signal.SIGKILL)
        server.process.kill()
        server.process.wait()
    shutil.copytree(folder / "spool", target / "spool", ignore=shutil.ignore_patterns("*-shm"))
    _without_address(target / "spool", events.url)
    return {
        "delivered": sorted(events.taken),
        "waiting": [f"{number:032x}" for number in _numbers(WAITING, 300)],
        "dead_letters": REFUSED,
        "quarantined": 1,
        "skipped": 1,
    }


async def _requests(socket: Path, events: EventsServer) -> None:
    """Have Kong hand requests over while the metering API takes, refuses, and is down."""
    queue = {"initial_retry_delay": 0.01, "max_retry_delay": 0.05, "max_coalescing_delay": 0.0}
    config: dict[str, object] = {
        "ingest_endpoint": events.url,
        "api_token": TOKEN,
        "queue": queue,
        "__plugin_id": "upgrade",
    }
    worker = KongWorker(socket)
    billed = PluginInstance(config)
    kept = PluginInstance(config | {"subject": {"missing": "quarantine"}, "__plugin_id": "quarantine"})

    def answer(post: Post) -> Answer:
        return refusal() if any(int(one, 16) >= 200 for one in post.ids) else Answer()

    events.script = answer
    for number in _numbers(DELIVERED, 100):
        await worker.log(billed, numbered("authenticated", number))
    await asyncio.to_thread(eventually, lambda: len(events.taken) == DELIVERED, what="the delivery")
    for number in _numbers(REFUSED, 200):
        await worker.log(billed, numbered("authenticated", number))
    await worker.log(billed, numbered("401-no-key", 400))
    await worker.log(kept, numbered("401-no-key", 401))
    spool = socket.parent / "spool"
    await asyncio.to_thread(eventually, lambda: _is_settled(spool), what="the dead letters")
    events.script = lambda _: Answer(503)
    for number in _numbers(WAITING, 300):
        await worker.log(billed, numbered("authenticated", number))
    await worker.close()


def _numbers(count: int, first: int) -> range:
    return range(first, first + count)


def _is_settled(spool: Path) -> bool:
    found = status(spool)
    return (found["dead_letters"], found["quarantined"], found["total"]["backlog"]) == (REFUSED, 1, 0)


def status(spool: Path) -> dict[str, Any]:
    """Return what `spool status` prints."""
    command = [sys.executable, "-m", "openmeter_plugin", "spool", "status", "--output=json", str(spool)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _without_address(spool: Path, url: str) -> None:
    """Replace the port of this run, which may belong to somebody when the spool is read."""
    for path in spool.rglob("*.json"):
        path.write_text(path.read_text().replace(url, ENDPOINT))


def _segments(target: Path) -> dict[str, Any]:
    worker = Worker(target / "segments")
    instance = worker.configure(configuration())
    names = [f"unread-{number}" for number in range(UNREAD)]
    worker.write(*(request_line(instance, name) for name in names))
    worker.end()
    return {"unread": names}


def _state(folder: Path, target: Path) -> dict[str, Any]:
    (folder / "kong.yml").write_text(KONG_YML.read_text())
    with running_sandbox(folder) as sandbox:
        (folder / "syncd.yaml").write_text(yaml.safe_dump(syncd_settings(sandbox)))
        for _ in range(2):
            syncd(folder, target / "state", "apply", "--yes")
    return {"runs": 2}


def syncd_settings(sandbox: str) -> dict[str, Any]:
    """Return a configuration that reads kong.yml beside it."""
    return {
        "owner_id": "upgrade",
        "sources": [{"type": "declarative-file", "path": "kong.yml"}],
        "metering": {"dialect": "openmeter-v1", "url": sandbox, "token": TOKEN},
        "mapping": {"group_by": "tag"},
    }


def syncd(folder: Path, state: Path, *arguments: str) -> str:
    """Run a command of syncd; returns what it printed."""
    environment = os.environ | {"SYNCD_CONFIG": str(folder / "syncd.yaml"), "STATE_DIRECTORY": str(state)}
    command = [sys.executable, "-m", "syncd", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    folder = DATA / __version__
    shutil.rmtree(folder, ignore_errors=True)
    write(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder.relative_to(ROOT)}: {size:,} bytes")
