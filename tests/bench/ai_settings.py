"""What the AI settings cost a request without `ai`: the same log with them off, by default, and all on."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from openmeter_plugin.instances.instance import Instance, start_instance
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.metering.kong_log import QueryResults
from openmeter_plugin.spool.writer import SpoolWriter
from tests.bench.goals import Goal
from tests.harness.recordings import serialized
from tests.plugin.spools import running_writer

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"meter_ai_token_usage": False, "meter_agent_requests": False},
    "default": {},
    "all on": {
        "ai_tokens": "split",
        "meter_ai_calls": True,
        "units": [{"name": "credits", "expression": "input + 0.1 * cache_read + 4 * (output + reasoning)"}],
    },
}
LOGS = {"GET": "authenticated", "POST": "post-body"}
"""Calls to models are POSTs, so only a POST is searched for a trace of one."""

_TURN = 2_000  # records; short, so that the machine's moods meet all alike
_MOST = 1.1

Figures = dict[tuple[str, str], list[float]]
"""CPU microseconds of each turn, by method and settings."""


def _turn(instance: Instance, raw: bytes, results: QueryResults) -> float:
    """Return the CPU microseconds for a record, from the log to the bytes for the spool."""
    before = time.process_time_ns()
    for _ in range(_TURN):
        spool_record(instance, raw, results)
    return (time.process_time_ns() - before) / _TURN / 1000


def measure(turns: int, tell: Callable[[str], None]) -> Figures:
    """Measure each log with each setting in turn."""
    logs = {method: orjson.dumps(serialized(name).parsed) for method, name in LOGS.items()}
    results, found = QueryResults(None, None), Figures()
    tell(f"a record without ai, {turns} turns of {_TURN:,}")
    with tempfile.TemporaryDirectory() as directory, running_writer(Path(directory)) as writer:
        instances = {name: _instance(number, name, writer) for number, name in enumerate(SETTINGS)}
        for turn in range(turns + 1):
            for method, raw in logs.items():
                for name, instance in instances.items():
                    figure = _turn(instance, raw, results)
                    if turn:  # the first one warms up
                        found.setdefault((method, name), []).append(figure)
    return found


def _instance(number: int, name: str, writer: SpoolWriter) -> Instance:
    config = {"ingest_endpoint": "http://127.0.0.1:9/events", "__plugin_id": name, **SETTINGS[name]}
    return start_instance(number, orjson.dumps(config), writer)


def run(turns: int, console: Console, tell: Callable[[str], None]) -> Goal:
    """Measure, print the table, and return the goal."""
    found = measure(turns, tell)
    shown = Table(title="A record of a request without ai", title_justify="left")
    for name in ("request", "AI settings", "CPU us", "ratio"):
        shown.add_column(name, justify="right" if name in ("CPU us", "ratio") else "left")
    ratios = []
    for (method, name), values in found.items():
        ratio = statistics.median(on / off for on, off in zip(values, found[method, "off"], strict=True))
        ratios.append(ratio)
        shown.add_row(method, name, f"{statistics.median(values):.2f}", f"{ratio:.3f}")
    console.print(shown)
    worst = max(ratios)
    what = "CPU of a record without ai, AI settings on / off"
    return Goal(what, f"{_MOST} or less", f"{worst:.3f}", worst <= _MOST)
