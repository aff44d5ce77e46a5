"""A disk that the workers can no longer write to counts as full, although space is reserved for the books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openmeter_plugin.api.health import HealthMonitor
from openmeter_plugin.api.metrics import Metrics
from tests.plugin.deliveries import record
from tests.plugin.spools import QUEUE, running_writer, small_file_system

FULL = "the spool's file system is full"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Path]:
    """A spool on a small file system, an eighth of which is reserved."""
    with small_file_system(tmp_path / "disk", "2m") as path:
        yield path


def fill(spool: Path) -> None:
    """Hand over more than fits on the disk."""
    with running_writer(spool, max_waiting_bytes=1024) as writer:
        writer.append_all([(writer.queue(QUEUE), record(n, text="x" * 5000), None, None) for n in range(600)])


def free_bytes(spool: Path) -> float:
    text = Metrics(HealthMonitor(spool)).scrape("")[0].decode()
    (sample,) = (line for line in text.splitlines() if line.startswith("openmeter_plugin_disk_free_bytes "))
    return float(sample.rpartition(" ")[2])


def test_a_disk_with_free_space_is_no_problem(spool: Path) -> None:
    assert FULL not in HealthMonitor(spool).problems()
    assert free_bytes(spool) > 1024 * 1024


def test_a_disk_on_which_usage_is_lost_is_reported_as_full(spool: Path) -> None:
    fill(spool)
    assert FULL in HealthMonitor(spool).problems()
    assert free_bytes(spool) < 64 * 1024
