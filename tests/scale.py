"""The model behind docs/scale.md: what fleets of 1 to 1,000 gateways and up to ten million consumers cost.

`python -m tests.scale` writes the tables into the page. Its inputs are defaults of the code and figures that
docs/benchmarks.md shows; tests hold that they are still these, and compare the numbers of requests with those
of real runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parents[1] / "docs" / "scale.md"

# Defaults of the code.
BATCH_EVENTS: Final = 500
BATCH_SECONDS: Final = 1.0
LIST_PAGE: Final = 1000
SUBJECTS_AT_ONCE: Final = 100
CONCURRENCY: Final = 8
USAGE_QUERIES: Final = 2

# Measured (docs/benchmarks.md).
EVENT_BYTES: Final = 5 * 2**30 / 8_800_000
CREATES_PER_SECOND: Final = 1_004
PLAN_SECONDS: Final = 3.2 / 100_000
PROCESS_MIB: Final = 60
PLAN_MIB: Final = (273 - PROCESS_MIB) / 100_000

API_SECONDS: Final = 0.02
"""The assumed answer time of the metering API."""

GATEWAYS: Final = (1, 10, 100, 1_000)
RATES: Final = (1, 100, 2_000)
CONSUMERS: Final = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)

_BLOCK: Final = re.compile(r"(<!-- scale: (\S+) -->\n)(.*?)(<!-- end of scale -->\n)", re.DOTALL)


def posts_per_second(gateways: int, rate: float) -> float:
    """Return the POSTs of events a second: each gateway waits for more events, until a batch is full."""
    return gateways * max(rate / BATCH_EVENTS, min(rate, 1 / BATCH_SECONDS))


def outage_bytes(rate: float, days: float = 1) -> float:
    """Return what the spool of one gateway holds after an outage of the metering API."""
    return rate * days * 86_400 * EVENT_BYTES


def read_requests(consumers: int, *, has_subjects: bool) -> int:
    """Return the requests to the metering API of a run that changes nothing, one subject a customer."""
    pages = max(1, math.ceil(consumers / LIST_PAGE))
    return pages * (2 if has_subjects else 1) + USAGE_QUERIES


def write_requests(consumers: int, *, has_subjects: bool) -> int:
    """Return the writes of a first sync: a customer each, subjects in groups (openmeter-v1)."""
    return consumers + (math.ceil(consumers / SUBJECTS_AT_ONCE) if has_subjects else 0)


def first_sync_seconds(consumers: int) -> float:
    """Return the time of the creates: by the concurrency and the API's answer time, or by syncd itself."""
    return consumers / min(CREATES_PER_SECOND, CONCURRENCY / API_SECONDS)


def run_seconds(consumers: int) -> float:
    """Return the time of a run that changes nothing: pages are read one after the other."""
    return consumers * PLAN_SECONDS + read_requests(consumers, has_subjects=True) * API_SECONDS


def memory_mib(consumers: int) -> float:
    """Return the peak memory of a run."""
    return PROCESS_MIB + consumers * PLAN_MIB


def _delivery() -> Iterator[Sequence[str]]:
    yield ("gateways", "requests/s each", "events/s", "POST/s", "spool of a gateway after a day's outage")
    for gateways in GATEWAYS:
        for rate in RATES:
            posts = posts_per_second(gateways, rate)
            yield (
                f"{gateways:,}",
                f"{rate:,}",
                f"{gateways * rate:,}",
                f"{posts:,.0f}",
                _bytes(outage_bytes(rate)),
            )


def _sync() -> Iterator[Sequence[str]]:
    yield (
        "consumers",
        "writes of the first sync",
        "its time",
        "requests of a later run",
        "its time",
        "memory",
    )
    for consumers in CONSUMERS:
        yield (
            f"{consumers:,}",
            f"{write_requests(consumers, has_subjects=True):,}",
            _time(first_sync_seconds(consumers)),
            f"{read_requests(consumers, has_subjects=True):,}",
            _time(run_seconds(consumers)),
            _bytes(memory_mib(consumers) * 2**20),
        )


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7_200 else f"{seconds / 3_600:,.1f} h"


_TABLES: Final = {"delivery": _delivery, "sync": _sync}


def table(name: str) -> str:
    """Return a table of the page as Markdown."""
    head, *rows = _TABLES[name]()
    lines = [head, ["---:"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def written(page: str) -> str:
    """Return the page with its tables made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[4]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
