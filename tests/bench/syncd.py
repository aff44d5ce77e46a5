"""syncd at scale, against bare httpx loops that send the same requests in turn with it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.goals import Goal
from tests.bench.processes import MIB
from tests.bench.syncd_apis import SETTINGS

CONCURRENCY = 8
FIRST, SYNCED = 20_000, 100_000
SIZES = (1_000, 10_000, 100_000)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pair:
    """Seconds of syncd and of the bare loop, one right after the other."""

    ours: float
    bare: float


def run(rounds: int, console: Console, tell: Tell) -> list[Goal]:
    """Measure, print the tables, and return the goals."""
    creates = first_sync(rounds, tell)
    reads, whole, peak = in_sync(rounds, tell)
    planned = planning(tell)
    table = Table(title=f"syncd: medians of {rounds} interleaved runs", title_justify="left")
    for name in ("what", "syncd s", "bare httpx s", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    rows = (
        (f"first sync of {FIRST:,}, whole process, {CONCURRENCY} at once", creates),
        (f"{SYNCED:,} in sync: read both sides, plan", reads),
        (f"{SYNCED:,} in sync: `syncd plan`, whole process", whole),
    )
    for name, pairs in rows:
        ours, bare = _median([pair.ours for pair in pairs]), _median([pair.bare for pair in pairs])
        table.add_row(name, f"{ours:.1f}", f"{bare:.1f}", f"{_ratio(pairs):.2f}")
    console.print(table)
    return [_creating(creates), _reading(reads), _memory(peak), _linear(planned)]


def first_sync(rounds: int, tell: Tell) -> list[Pair]:
    """Time `syncd apply` on an empty metering API, and a bare loop that creates the same customers."""
    pairs: list[Pair] = []
    with _apis(FIRST) as (url, folder):
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}: first sync of {FIRST:,}")
            bare = _timed("tests.bench.syncd_bare", "create", url, str(FIRST), str(CONCURRENCY))
            _require_created(url)
            state = folder / f"state-{number}"
            ours = _timed(
                "syncd", "--config", str(_config(folder, url)), "apply", "--yes", STATE_DIRECTORY=str(state)
            )
            _require_created(url)
            pairs.append(Pair(ours, bare))
    return pairs


def in_sync(rounds: int, tell: Tell) -> tuple[list[Pair], list[Pair], int]:
    """Time reading and planning, and the whole command; return its peak memory in bytes as well."""
    reads: list[Pair] = []
    whole: list[Pair] = []
    peak = 0
    with _apis(SYNCED, "--synced") as (url, folder):
        config = str(_config(folder, url))
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}: {SYNCED:,} in sync")
            started = time.perf_counter()
            bare = float(_output("tests.bench.syncd_bare", "read", url))
            bare_whole = time.perf_counter() - started
            reads.append(Pair(float(_output("tests.bench.syncd_ours", "read", config)), bare))
            started = time.perf_counter()
            peak = max(peak, _peak_of("syncd", "--config", config, "plan"))
            whole.append(Pair(time.perf_counter() - started, bare_whole))
    return reads, whole, peak


def planning(tell: Tell) -> dict[int, float]:
    """Return the seconds per principal of mapping and planning, in memory, by the number of principals."""
    found: dict[int, float] = {}
    for size in SIZES:
        tell(f"planning {size:,} principals")
        found[size] = float(json.loads(_output("tests.bench.syncd_ours", "plan", str(size)))) / size
    return found


def _creating(pairs: list[Pair]) -> Goal:
    ratio = 1 / _ratio(pairs)
    ours, bare = (FIRST / _median(times) for times in zip(*((p.ours, p.bare) for p in pairs), strict=True))
    detail = f"{ratio:.2f} ({ours:,.0f} of {bare:,.0f} creates/s)"
    return Goal("first sync, creates/s, syncd / bare httpx loop", "0.9 or more", detail, ratio >= 0.9)


def _reading(pairs: list[Pair]) -> Goal:
    ratio = _ratio(pairs)
    return Goal("read and plan in sync, syncd / bare httpx loop", "1.3 or less", f"{ratio:.2f}", ratio <= 1.3)


def _memory(peak: int) -> Goal:
    what = f"peak memory (VmHWM), `syncd plan` of {SYNCED:,}"
    return Goal(what, "under 300 MiB", f"{peak / MIB:.0f} MiB", peak < 300 * MIB)


def _linear(per_principal: dict[int, float]) -> Goal:
    ratio = max(per_principal.values()) / min(per_principal.values())
    figures = ", ".join(f"{seconds * 1e6:.1f}" for seconds in per_principal.values())
    what = "us per principal to plan 10^3, 10^4, 10^5: largest / smallest"
    return Goal(what, "2 or less", f"{ratio:.2f} ({figures})", ratio <= 2)


def _ratio(pairs: list[Pair]) -> float:
    return _median([pair.ours / pair.bare for pair in pairs])


def _median(values: tuple[float, ...] | list[float]) -> float:
    return statistics.median(values)


@contextmanager
def _apis(consumers: int, *flags: str) -> Iterator[tuple[str, Path]]:
    command = [sys.executable, "-m", "tests.bench.syncd_apis", str(consumers), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield process.stdout.readline().strip(), Path(folder)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _config(folder: Path, url: str) -> Path:
    path = folder / "syncd.yaml"
    path.write_text(SETTINGS.format(url=url, concurrency=CONCURRENCY))
    return path


def _require_created(url: str) -> None:
    """Make sure that all were made, and have the API forget them."""
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert int(client.get("/created").text) == FIRST
        client.post("/forget").raise_for_status()


def _environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SYNCD_")}
    return {**clean, **variables}


def _timed(*command: str, **variables: str) -> float:
    started = time.perf_counter()
    argv = [sys.executable, "-m", *command]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=_environment(**variables))
    return time.perf_counter() - started


def _output(*command: str) -> str:
    argv = [sys.executable, "-m", *command]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=_environment()).stdout


def _peak_of(*command: str) -> int:
    """Run a command, which must end with 0, and return the most memory that it had in bytes."""
    argv, peak = [sys.executable, "-m", *command], 0
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=_environment()) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])
            time.sleep(0.005)
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}"
    return peak
