"""Fixtures of the plugin's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.spool.destination import QUARANTINE, write_destination
from syncd.sandbox.testing import running_sandbox
from tests.plugin.deliveries import record, rejects, run_until_empty, skip, spooled
from tests.plugin.events_server import EventsServer, serving
from tests.plugin.operations_api import Api, api
from tests.plugin.spool_commands import NEW, OLD, TOKEN, quarantine_record
from tests.plugin.spools import Disk, destination


@pytest.fixture
def server() -> Iterator[EventsServer]:
    """An events endpoint that accepts everything, until a test sets another script."""
    with serving() as running:
        yield running


@pytest.fixture
def sandbox() -> Iterator[str]:
    """A metering API that needs no token."""
    with running_sandbox() as url:
        yield url


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """The captured log lines."""
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk below the spool, retried often."""
    disk = Disk(tmp_path)
    monkeypatch.setattr(os, "write", disk.write)
    return disk


@pytest.fixture
def history(tmp_path: Path, server: EventsServer) -> Path:
    """A spool: 5 events delivered, 1 refused, 2 requests skipped, 1 quarantined, 1 resent, 2 new events."""
    server.script = rejects({"event-000003"})
    spool = tmp_path / "spool"
    write_destination(spool, destination(server.url, token=TOKEN))
    spooled(
        spool,
        [*(record(n, time=OLD) for n in range(6)), record(5, time=OLD), skip(), skip("status_excluded")],
    )
    spooled(spool, [quarantine_record(1)], QUARANTINE)
    run_until_empty(spool)
    spooled(spool, [record(10, 11, subject="consumer:bob", time=NEW)])
    return spool


@pytest.fixture(scope="module")
def running_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server with an HTTP API, shared by all tests of a file; they only read."""
    with api(tmp_path_factory.mktemp("api")) as running:
        yield running
