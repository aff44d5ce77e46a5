"""This version goes on with what earlier ones left on disk: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin import __version__
from tests.demo.__main__ import TOKEN, running_sandbox, stats
from tests.demo.gateway import KONG_YML
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.kong_segments import ENDPOINT
from tests.harness.process import eventually, plugin_server
from tests.plugin.events_server import EventsServer, serving
from tests.plugin.traffic import request
from tests.upgrade import DATA, status, syncd, syncd_settings

pytestmark = pytest.mark.slow
VERSIONS = sorted(path.name for path in DATA.iterdir())
each = pytest.mark.parametrize("version", VERSIONS)


def left_by(version: str, folder: Path, url: str = "") -> dict[str, Any]:
    """Copy what a version left, with this address of the metering API; returns what is expected of it."""
    shutil.copytree(DATA / version, folder, dirs_exist_ok=True)
    if url:
        for path in (folder / "spool").rglob("*.json"):
            path.write_text(path.read_text().replace(ENDPOINT, url))
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def plugin(*arguments: str) -> str:
    command = [sys.executable, "-m", "openmeter_plugin", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_this_version_or_one_before_it_is_there() -> None:
    assert VERSIONS
    assert max(VERSIONS, key=lambda one: [int(part) for part in one.split(".")]) <= __version__


@each
def test_the_books_of_an_earlier_version_are_read(version: str, tmp_path: Path) -> None:
    expected = left_by(version, tmp_path)
    found = status(tmp_path / "spool")
    assert found["total"]["books"]["delivered"] == len(expected["delivered"])
    assert found["total"]["backlog"] == len(expected["waiting"])
    assert found["dead_letters"] == expected["dead_letters"]
    assert found["quarantined"] == expected["quarantined"]
    assert sum(found["total"]["books"]["skipped"].values()) == expected["skipped"]


@each
def test_a_spool_of_an_earlier_version_is_drained_once(version: str, tmp_path: Path) -> None:
    with serving(EventsServer()) as events:
        expected = left_by(version, tmp_path, events.url)
        plugin("spool", "drain", str(tmp_path / "spool"))
        assert sorted(events.came) == expected["waiting"]
        assert set(events.came.values()) == {1}
        plugin("spool", "verify", str(tmp_path / "spool"))
        plugin("spool", "replay", "--all", str(tmp_path / "spool"))
        plugin("spool", "drain", str(tmp_path / "spool"))
        assert len(events.came) == len(expected["waiting"]) + expected["dead_letters"]
        assert not set(events.came) & set(expected["delivered"])
    assert status(tmp_path / "spool")["dead_letters"] == 0


@each
def test_a_plugin_server_goes_on_with_the_spool_and_the_segments_of_an_earlier_version(
    version: str, tmp_path: Path
) -> None:
    with serving(EventsServer()) as events:
        expected = left_by(version, tmp_path, events.url)
        place = tmp_path / "segments"
        place.chmod(0o2770)
        config: dict[str, object] = {"ingest_endpoint": events.url, "api_token": TOKEN}
        with plugin_server(tmp_path, "--segments", str(place)) as server:

            async def one_more() -> None:
                worker = KongWorker(server.socket)
                assert await worker.log(PluginInstance(config), request(7)[0])
                await worker.close()

            asyncio.run(one_more())
            wanted = {*expected["waiting"], request(7)[1]}
            eventually(lambda: wanted <= set(events.came), what="old and new events")
            left = len(expected["unread"])
            eventually(lambda: status(server.spool)["total"]["backlog"] == left, what="Kong's segment")
        # Kong's half names its configuration by its hash, so its address cannot be replaced before.
        plugin("spool", "drain", "--endpoint", events.url, str(tmp_path / "spool"))
        assert set(events.came) == {*wanted, *expected["unread"]}
        assert set(events.came.values()) == {1}
        plugin("spool", "verify", str(tmp_path / "spool"))


@each
def test_syncd_goes_on_with_the_history_of_an_earlier_version(version: str, tmp_path: Path) -> None:
    expected = left_by(version, tmp_path)
    (tmp_path / "kong.yml").write_text(KONG_YML.read_text())
    with running_sandbox(tmp_path) as sandbox:
        (tmp_path / "syncd.yaml").write_text(yaml.safe_dump(syncd_settings(sandbox)))
        state = tmp_path / "state"
        old = json.loads(syncd(tmp_path, state, "history", "--output", "json"))
        assert len(old) == expected["runs"]
        syncd(tmp_path, state, "apply", "--yes")
        new = json.loads(syncd(tmp_path, state, "history", "--output", "json"))
        assert len(new) == expected["runs"] + 1
        assert [run["id"] for run in old] == [run["id"] for run in new][1:]
        assert stats(sandbox)["events_stored"] == 0
