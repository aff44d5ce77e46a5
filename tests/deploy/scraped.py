"""What the running plugin server and the running syncd answer at /metrics."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from openmeter_plugin.api.access import TOKEN_VARIABLE
from syncd.close.collect import EMPTY
from syncd.close.report import Month, make
from syncd.close.store import ClosedMonths
from syncd.sandbox.testing import running_sandbox
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.ports import free_port
from tests.harness.process import eventually, plugin_server
from tests.harness.recordings import serialized
from tests.syncd.processes import Project, command

TOKEN = "token-of-whoever-may-use-the-api"


@dataclass(frozen=True)
class Family:
    """A metric: its name as it is asked for, such as `..._total`."""

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...]


def scrape(folder: Path) -> dict[str, Family]:
    """Return the metrics of both, by name, after each has seen something of everything."""
    found: dict[str, Family] = {}
    for name, metrics in (("plugin", _of_the_plugin), ("syncd", _of_syncd)):
        (folder / name).mkdir()
        found |= {family.name: family for family in _families(metrics(folder / name))}
    return found


def _families(text: str) -> Iterator[Family]:
    for metric in text_string_to_metric_families(text):
        if metric.name.endswith("_created"):  # when a counter began, which the client library adds
            continue
        labels = dict.fromkeys(label for sample in metric.samples for label in sample.labels if label != "le")
        assert metric.samples, f"{metric.name} was not seen with a value, so its labels are not known"
        suffix = "_total" if metric.type == "counter" else ""
        meaning = metric.documentation.removesuffix(".")
        yield Family(metric.name + suffix, metric.type, meaning, tuple(labels))


def _of_the_plugin(folder: Path) -> str:
    gate = folder / "gate.json"
    options = "--api", "127.0.0.1:0", "--gate", str(gate), "--segments", str(folder / "segments")
    with ExitStack() as stack:
        url = stack.enter_context(running_sandbox())
        socket = str(folder / "gate.sock")
        gate.write_text(
            json.dumps({"metering": {"url": url}, "features": [{"key": "api"}], "socket": socket})
        )
        server = stack.enter_context(plugin_server(folder, *options, environment={TOKEN_VARIABLE: TOKEN}))
        asyncio.run(_two_requests(server.socket, f"{url}/api/v1/events"))
        pattern = r'"(127\.0\.0\.1:\d+)"'
        address = eventually(lambda: re.findall(pattern, server.log_text()), seconds=60, what="listening")[0]
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx.Client(
            base_url=f"http://{address}", headers=headers, trust_env=False, timeout=20
        ) as client:

            def delivered() -> str | None:
                text = client.get("/metrics").text
                is_all = re.search(r"events_delivered_total\{.*\} 1\.0", text) and "gate_up 1.0" in text
                return text if is_all else None

            return eventually(delivered, seconds=60, what="delivery") or ""


async def _two_requests(socket: Path, endpoint: str) -> None:
    """One that becomes an event, and one that does not."""
    worker = KongWorker(socket)
    plugin = PluginInstance({"ingest_endpoint": endpoint, "queue": {"max_coalescing_delay": 0.0}})
    for name in ("authenticated", "401-no-key"):
        assert await worker.log(plugin, serialized(name))
    await worker.close()


@contextmanager
def _daemon(project: Project, log: Path) -> Iterator[str]:
    port = free_port()
    project.configure(f"daemon: {{listen: '127.0.0.1:{port}'}}\n")
    with log.open("w") as output:
        process = subprocess.Popen(
            command("run"), cwd=project.folder, env=project.environment(), stdout=output, stderr=output
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def _of_syncd(folder: Path) -> str:
    with running_sandbox() as url:
        project = Project(folder, url)
        with State(StateLocation(folder / "state")) as state:
            ClosedMonths(state).keep(make(Month(2026, 1), EMPTY, []), 0, datetime.now(UTC), None)
        with (
            _daemon(project, folder / "log") as daemon,
            httpx.Client(base_url=daemon, trust_env=False, timeout=20) as client,
        ):
            eventually(lambda: _has_synced(client), seconds=60, what="a first sync")
            # And one that fails: a source that is not there any more.
            (folder / "kong.yml").unlink()
            client.post("/v1/syncs", json={}).raise_for_status()
            return eventually(lambda: _with_a_failure(client), seconds=60, what="a failed run")


def _has_synced(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _with_a_failure(client: httpx.Client) -> str:
    text = client.get("/metrics").text
    seen = 'syncd_run_failures_total{reason="source"}' in text and "syncd_late_requests{" in text
    return text if seen else ""
