"""`python -m tests.plugin.gate.outage`: the metering API away for an hour, behind a real Kong.

A Kong of two workers serves five requests a second of three customers, through both shells: `payer` has
plenty left, `spent` has nothing left, and `tight` uses up what it has during the outage, unless readings grow
too old before. The metering API is a process that ends and starts again on its port and data. Reported are
what each customer was answered and since when, the slowest answer, and what was billed in the end. Needs
`kong` in the PATH; `--minutes 0.5 --max-stale 10` shows the same in a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from tests.bench.processes import MIB, end_cleanly, pss_bytes
from tests.harness.process import eventually
from tests.plugin.gate.gateway import PATHS, Lane, Traffic, consumer_id, kong
from tests.plugin.gate.test_process import Node, free_port

CONSUMERS: Final = ("payer", "spent", "tight")
PAUSE: Final = 1.2
"""Seconds between two requests of one of the six lanes: five requests a second."""
_PLENTY: Final = 10_000_000
_STARTS: Final = 60
_ENDS: Final = 600


@dataclass
class Outcome:
    """What was seen. Times are seconds since the API ended; those of `back` since it was there again."""

    answers: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By shell and consumer: the first status, and each that differs from the one before."""
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    closed: int = 0
    back: dict[str, float] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    billed: dict[str, int] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    """MiB of the plugin server's processes, before the outage and at its end."""
    log_bytes: int = 0


@contextmanager
def metering_api(folder: Path, port: int) -> Iterator[None]:
    """Run the sandbox as a process, as it would be started again by a service manager."""
    command = [
        sys.executable,
        "-m",
        "syncd.sandbox",
        "--port",
        str(port),
        "--db",
        str(folder / "api.sqlite3"),
    ]
    with (folder / "api.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        eventually(lambda: _answers(port), seconds=_STARTS, what="the metering API")
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=2, trust_env=False).status_code > 0
    except httpx.TransportError:
        return False


def run(folder: Path, seconds: float, left: int, tell: Callable[[str], None], **settings: Any) -> Outcome:
    """Return what happened while the metering API was away for so long, and after it."""
    port = free_port()
    folder.chmod(0o755)
    with ExitStack() as stack:
        node = Node(folder, f"http://127.0.0.1:{port}", socket_mode="0666", **settings)
        stack.callback(node.close)
        with metering_api(folder, port):
            for name, allowance in zip(CONSUMERS, (_PLENTY, 0, left), strict=True):
                node.customer(allowance, f"consumer:{consumer_id(name)}", name)
            server = stack.enter_context(node.running()).pid
            gateway = stack.enter_context(kong(node, CONSUMERS))
            traffic = stack.enter_context(Traffic(gateway, CONSUMERS, PAUSE))
            eventually(lambda: _decided(traffic), seconds=_STARTS, what="a decision about each")
        began, outcome = time.monotonic(), Outcome(memory=[pss_bytes(server) / MIB])
        _wait(traffic, seconds, tell)
        outcome.memory.append(pss_bytes(server) / MIB)
        try:
            with metering_api(folder, port):
                _come_back(node, traffic, outcome, tell)
        except AssertionError as error:  # an hour is not lost because its end is late
            outcome.failures.append(str(error))
        traffic.stop()
        _note(traffic, outcome, began)
        outcome.log_bytes = (folder / "log").stat().st_size
        return outcome


def _decided(traffic: Traffic) -> bool:
    newest = {(lane.shell, lane.consumer): lane.statuses[-1:] for lane in traffic.lanes}
    return all(newest[shell, name] == [429 if name == "spent" else 200] for shell, name in newest)


def _wait(traffic: Traffic, seconds: float, tell: Callable[[str], None]) -> None:
    end, said = time.monotonic() + seconds, 0.0
    while (now := time.monotonic()) < end:
        if now - said >= 60:
            said = now
            tell(f"{end - now:.0f} s to go; newest answers: {_newest(traffic)}")
        time.sleep(min(1.0, end - now))


def _newest(traffic: Traffic) -> str:
    return ", ".join(f"{lane.shell} {lane.consumer} {lane.statuses[-1]}" for lane in traffic.lanes)


def _come_back(node: Node, traffic: Traffic, outcome: Outcome, tell: Callable[[str], None]) -> None:
    """Wait until decisions are those of new readings, and until all that passed is billed."""
    back = time.monotonic()
    lanes = {(lane.shell, lane.consumer): lane for lane in traffic.lanes}
    marks = {key: len(lane.statuses) for key, lane in lanes.items()}
    for shell in PATHS:
        for name, status in (("spent", 429), ("payer", 200)):
            key = shell, name
            eventually(
                lambda: status in lanes[key].statuses[marks[key] :],  # noqa: B023
                seconds=_ENDS,
                what=f"{status} of {name}",
            )
            outcome.back[f"{shell} {name}"] = time.monotonic() - back
            tell(f"{shell} {name}: {status} after {outcome.back[f'{shell} {name}']:.1f} s")
    traffic.stop()
    for name in CONSUMERS:
        outcome.passed[name] = sum(
            lane.statuses.count(200) for lane in traffic.lanes if lane.consumer == name
        )
        eventually(lambda: _billed(node, name) >= outcome.passed[name], seconds=_ENDS, what="the bill")  # noqa: B023
        outcome.back["all is billed"] = time.monotonic() - back
    time.sleep(5)  # what would be billed twice comes later
    outcome.billed = {name: _billed(node, name) for name in CONSUMERS}


def _billed(node: Node, name: str) -> int:
    where = {"subject": f"consumer:{consumer_id(name)}"}
    found = node.api.get("/api/v1/meters/kong_api_requests/query", params=where).json()["data"]
    return int(found[0]["value"]) if found else 0


def _note(traffic: Traffic, outcome: Outcome, began: float) -> None:
    for lane in traffic.lanes:
        name = f"{lane.shell} {lane.consumer}"
        outcome.statuses[name] = Counter(lane.statuses)
        outcome.answers[name] = [(at - began, status) for at, status in changes(lane)]
    outcome.failures, outcome.slowest, outcome.closed = (
        traffic.failures(),
        traffic.slowest(),
        traffic.closed(),
    )


def changes(lane: Lane) -> list[tuple[float, int]]:
    """Return when the status of a lane's answers became another."""
    found: list[tuple[float, int]] = []
    for at, status in zip(lane.times, lane.statuses, strict=True):
        if not found or found[-1][1] != status:
            found.append((at, status))
    return found


def report(outcome: Outcome) -> str:
    """Return the outcome as text."""
    lines = [f"failures: {outcome.failures or 'none'}; slowest answer {outcome.slowest * 1000:.0f} ms"]
    lines.append(
        f"kept connections closed by Kong: {outcome.closed}; log of the plugin server: {outcome.log_bytes} B"
    )
    lines.append("memory of the plugin server, MiB: " + ", ".join(f"{each:.0f}" for each in outcome.memory))
    for name, answers in outcome.answers.items():
        shown = " -> ".join(f"{status} at {at:.1f} s" for at, status in answers[:20])
        lines.append(f"{name}: {shown}; {len(answers) - 1} changes; {dict(outcome.statuses[name])}")
    lines += [f"back: {name} after {seconds:.1f} s" for name, seconds in outcome.back.items()]
    lines += [
        f"{name}: {passed} passed, {outcome.billed.get(name)} billed"
        for name, passed in outcome.passed.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Run an outage; the exit status is 1 if a request failed or waited, or the bill is wrong."""
    options = argparse.ArgumentParser(prog="python -m tests.plugin.gate.outage")
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--max-stale", type=float, default=300.0)
    options.add_argument("--on-stale", choices=("allow", "deny"), default="allow")
    options.add_argument("--left", type=int, default=2_000, help="of the customer `tight`")
    given = options.parse_args()
    end_cleanly()
    settings = {"max_stale": given.max_stale, "on_stale": given.on_stale}
    with tempfile.TemporaryDirectory() as folder:
        tell = lambda text: print(time.strftime("%H:%M:%S"), text, flush=True)  # noqa: E731
        outcome = run(Path(folder), given.minutes * 60, given.left, tell, **settings)
        print(report(outcome))
    return int(bool(outcome.failures) or outcome.slowest >= 1 or outcome.billed != outcome.passed)


if __name__ == "__main__":
    sys.exit(main())
