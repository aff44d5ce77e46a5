"""The dashboard in a generated world: page times, memory, and requests to the metering API."""

from __future__ import annotations

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.goals import Goal
from tests.bench.processes import MIB, cpu_seconds

CUSTOMERS, SUBJECTS, DAYS = 10_000, 30_000, 90
_VIEWS = 5
_PATIENCE = 1500.0
"""Seconds for the first run and the first refresh together."""
_AGAIN = 20
"""Several refreshes share the first 90 days: each asks for totals and for days that may have changed."""
_MEMORY = 400 * MIB
_PAGE_SECONDS = 0.5

CONFIG = """
sources: [{{type: kong-admin, url: '{url}/kong'}}]
metering: {{url: '{url}'}}
mapping: {{group_by: tag}}
schedule: {{interval: 1h}}
usage: {{interval: 1h}}
prices:
  currency: EUR
  rates:
    - meter: kong_api_requests
      price: graduated
      tiers: [{{up_to: 100000, amount: 0}}, {{amount: 0.0001}}]
    - {{meter: kong_llm_tokens, where: {{type: input}}, amount: 2, per: 1000000}}
    - {{meter: kong_llm_tokens, amount: 8, per: 1000000}}
daemon: {{listen: '127.0.0.1:{port}', state_dir: state}}
"""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """A page: the seconds of its first view, and the median of further ones; `cpu` is what the daemon spent.

    On a busy machine the wall clock says more of its neighbours than of the page; the CPU seconds do not.
    """

    path: str
    first: float
    again: float
    first_cpu: float
    cpu: float
    size: int


@contextmanager
def world(customers: int = CUSTOMERS, subjects: int = SUBJECTS, days: int = DAYS) -> Iterator[str]:
    """Run the world in a process of its own and yield its URL."""
    command = [sys.executable, "-m", "tests.bench.world", "--customers", str(customers)]
    command += ["--subjects", str(subjects), "--days", str(days)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def daemon(folder: Path, url: str) -> Iterator[tuple[str, int]]:
    """Run a daemon in this world and yield its URL and process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "syncd.yaml").write_text(CONFIG.format(url=url, port=port))
    command = [sys.executable, "-m", "syncd", "--config", str(folder / "syncd.yaml"), "run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SYNCD_")}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def run(console: Console, tell: Tell) -> list[Goal]:
    """Measure, print the tables, and return the goals."""
    with (
        tempfile.TemporaryDirectory() as name,
        world() as url,
        daemon(Path(name), url) as (own, pid),
    ):
        tell(f"the first run and refresh of {SUBJECTS:,} subjects")
        seconds = _wait(own, Path(name) / "log")
        counts = httpx.get(f"{url}/counts", trust_env=False).json()
        filled = _peak(pid)
        tell("the pages")
        pages = [_served(own, pid, path) for path in _paths()]
        after = httpx.get(f"{url}/counts", trust_env=False).json()
        peak = _peak(pid)
        size = sum(file.stat().st_size for file in (Path(name) / "state").iterdir())
    table = Table(title=f"{CUSTOMERS:,} customers, {SUBJECTS:,} subjects, {DAYS} days", title_justify="left")
    for head in ("page", "first view s", "CPU s", f"median of {_VIEWS} more, s", "CPU s", "KiB"):
        table.add_column(head, justify="left" if head == "page" else "right", overflow="fold")
    for page in pages:
        cells = (f"{page.first:.2f}", f"{page.first_cpu:.2f}", f"{page.again:.3f}", f"{page.cpu:.2f}")
        table.add_row(page.path, *cells, f"{page.size / 1024:,.0f}")
    console.print(table)
    console.print(
        f"first run and whole usage: {seconds:.0f} s, peak {filled / MIB:.0f} MiB; state {size / MIB:.0f} MiB"
    )
    console.print(f"requests until then: {counts}")
    slowest = max(page.again for page in pages)
    asked = sum(after.get(kind, 0) - counts.get(kind, 0) for kind in ("GET totals", "GET day"))
    return [
        Goal(
            "slowest page, later views", "under 500 ms", f"{slowest * 1000:.0f} ms", slowest < _PAGE_SECONDS
        ),
        Goal("peak memory of the daemon (VmHWM)", "under 400 MiB", f"{peak / MIB:.0f} MiB", peak < _MEMORY),
        Goal("meter queries for pages", "0", str(asked), asked == 0),
        Goal(
            "meter queries for the first 90 days of two meters",
            f"at most {2 * DAYS + _AGAIN}",
            str(counts["GET totals"] + counts["GET day"]),
            counts["GET totals"] + counts["GET day"] <= 2 * DAYS + _AGAIN,
        ),
    ]


def _paths() -> list[str]:
    today = datetime.now(UTC).date()
    month = (today.replace(day=1) - timedelta(days=1)).strftime("%Y-%m")
    since = (today - timedelta(days=DAYS - 1)).isoformat()
    return [
        "/dashboard/",
        "/dashboard/usage",
        f"/dashboard/usage?month={month}",
        f"/dashboard/usage?from={since}",
        "/dashboard/usage?csv=customers",
        "/dashboard/customers",
        "/dashboard/customers?q=user-12345",
        "/dashboard/customers/acme00001",
        "/dashboard/unbilled",
    ]


def _served(own: str, pid: int, path: str) -> Served:
    seconds: list[float] = []
    spent: list[float] = []
    size = 0
    with httpx.Client(base_url=own, trust_env=False, timeout=300) as client:
        for _ in range(_VIEWS + 1):
            begun, used = time.perf_counter(), cpu_seconds(pid)
            answer = client.get(path)
            seconds.append(time.perf_counter() - begun)
            spent.append(cpu_seconds(pid) - used)
            if answer.status_code != 200:
                raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
            size = len(answer.content)
    again, cpu = statistics.median(seconds[1:]), statistics.median(spent[1:])
    return Served(path, seconds[0], again, spent[0], cpu, size)


def _wait(own: str, log: Path) -> float:
    """Wait until the first run and the whole first refresh have ended; return the seconds."""
    begun = time.monotonic()
    while time.monotonic() - begun < _PATIENCE:
        refreshed = re.search(r'"?remaining"?[=:] ?0\b', log.read_text())
        if refreshed and httpx.get(f"{own}/v1/status", trust_env=False, timeout=30).json()["last"]:
            return time.monotonic() - begun
        time.sleep(1)
    raise SystemExit(f"the first refresh did not end; the daemon's log:\n{log.read_text()[-3000:]}")


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the daemon has ended")
