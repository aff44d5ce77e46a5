"""Idle queues: looked at less and less often, and at once again when they are used."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from openmeter_plugin.delivery.pipeline import POLL, Idle
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, ids, record, spooled
from tests.plugin.events_server import serving
from tests.plugin.spools import destination


def test_the_pause_grows_to_a_second_and_is_short_again_after_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    idle = Idle()
    assert idle.pause == POLL
    now[0] += 10
    assert POLL < idle.pause < 1
    now[0] += 1000
    assert idle.pause == 1
    idle.used()
    assert idle.pause == POLL


def test_whoever_waits_is_woken_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmeter_plugin.delivery.pipeline.POLL", 30.0)
    monkeypatch.setattr("openmeter_plugin.delivery.pipeline._LONGEST_PAUSE", 30.0)

    async def waited() -> float:
        idle = Idle()
        started = time.monotonic()
        asyncio.get_running_loop().call_later(0.05, idle.used)
        await idle.wait()
        return time.monotonic() - started

    assert asyncio.run(waited()) < 5


def test_a_queue_that_was_idle_for_long_delivers_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openmeter_plugin.delivery.pipeline._PAUSE_PER_IDLE_SECOND", 1000.0)
    with serving() as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1)])
        with delivering(tmp_path):
            eventually(lambda: server.taken == ids(range(1, 2)), seconds=5)
            spooled(tmp_path, [record(2)])
            eventually(lambda: server.taken == ids(range(1, 3)), seconds=5)
