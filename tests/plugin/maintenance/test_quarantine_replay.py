"""Replay of the quarantine: each request becomes events that are counted and sent once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.config.instance_config import ConfigError
from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.instances.instance import start_instance
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.maintenance.quarantine_replay import QuarantineReplay, replay_quarantine
from openmeter_plugin.metering.kong_log import QueryResults
from openmeter_plugin.spool.destination import QUARANTINE
from tests.harness.books import read_counts, read_dead_letters
from tests.harness.process import eventually
from tests.harness.recordings import serialized
from tests.plugin.deliveries import assert_balanced, count, delivered, delivering, run_until_empty, waiting
from tests.plugin.events_server import EventsServer
from tests.plugin.spools import running_writer


def plugin(**changes: Any) -> dict[str, Any]:
    return {"ingest_endpoint": "http://127.0.0.1:9/events", "__plugin_id": "the-plugin", **changes}


def quarantine_requests(spool: Path, config: dict[str, Any], number: int) -> None:
    """Quarantine requests under a configuration that causes it, as the plugin server does."""
    log = serialized("authenticated").parsed
    written: list[Any] = []
    with running_writer(spool, written.extend) as writer:
        instance = start_instance(1, orjson.dumps(config), writer)
        for n in range(number):
            log["request"]["id"] = f"{n:032x}"
            found = spool_record(instance, orjson.dumps(log), QueryResults(None, None))
            assert isinstance(found, tuple)
            queue, made = found
            writer.append(queue, made, n)
        eventually(lambda: len(written) == number)


INVALID = {"attributes": [{"source": "constant", "event_property_name": "region"}]}
WITHOUT_SUBJECT = {"subject": {"look_up_value_in": "header", "field": "x-none", "missing": "quarantine"}}


@pytest.mark.parametrize("cause", [INVALID, WITHOUT_SUBJECT], ids=["configuration", "subject"])
def test_a_replayed_quarantine_becomes_events_and_both_equations_hold(
    tmp_path: Path, server: EventsServer, cause: dict[str, Any]
) -> None:
    config = plugin(ingest_endpoint=server.url)
    quarantine_requests(tmp_path, config | {"subject": {"fallbacks": []}} | cause, 10)
    run_until_empty(tmp_path)
    assert count(tmp_path, "quarantined", queue=QUARANTINE) == 10
    with delivering(tmp_path):
        replay = replay_quarantine(tmp_path, config, transaction_size=3)
        assert replay == QuarantineReplay(metered=10, events=10)
        eventually(lambda: len(server.taken) == 10, what="the arrival")
        (queue,) = [name for name in read_counts(tmp_path) if name != QUARANTINE]
        eventually(lambda: delivered(tmp_path, queue) == 10)
    counts = read_counts(tmp_path)
    assert counts[QUARANTINE]["quarantined", ""] == 0
    assert (counts[QUARANTINE]["requests", ""], counts[QUARANTINE]["metered", ""]) == (10, 10)
    assert (counts[queue]["events", ""], counts[queue]["dead_lettered", ""]) == (10, 0)
    assert read_dead_letters(tmp_path) == []
    assert_balanced(tmp_path)
    assert replay_quarantine(tmp_path, config) == QuarantineReplay()


def test_a_replay_counts_skipped_requests_and_leaves_those_without_a_subject(
    tmp_path: Path,
) -> None:
    quarantine_requests(tmp_path, plugin() | INVALID, 4)
    run_until_empty(tmp_path)
    no_subject = {"look_up_value_in": "header", "field": "x-none", "fallbacks": []}
    for stays in (no_subject, no_subject | {"missing": "quarantine"}):
        assert replay_quarantine(tmp_path, plugin(subject=stays)) == QuarantineReplay(left=4)
    assert count(tmp_path, "quarantined", queue=QUARANTINE) == 4
    skipped = plugin(subject=no_subject | {"missing": "skip"})
    found = replay_quarantine(tmp_path, skipped, ids=[2, 3, 77])
    assert found == QuarantineReplay(skipped=Counter({"no_header": 2}))
    assert count(tmp_path, "quarantined", queue=QUARANTINE) == 2
    assert count(tmp_path, "skipped", "no_header", QUARANTINE) == 2
    assert_balanced(tmp_path)


def test_a_replay_under_an_invalid_configuration_changes_nothing(tmp_path: Path) -> None:
    quarantine_requests(tmp_path, plugin() | INVALID, 2)
    run_until_empty(tmp_path)
    before = read_counts(tmp_path)
    with pytest.raises(ConfigError):
        replay_quarantine(tmp_path, plugin() | INVALID)
    assert read_counts(tmp_path) == before


def test_a_replay_writes_destination_and_token_of_a_queue_without_one(
    tmp_path: Path, server: EventsServer
) -> None:
    config = plugin(ingest_endpoint=server.url, api_token="from-the-file")
    quarantine_requests(tmp_path, config | INVALID, 1)
    run_until_empty(tmp_path)
    replay_quarantine(tmp_path, config)
    run_until_empty(tmp_path)
    assert [post.headers["authorization"] for post in server.posts] == ["Bearer from-the-file"]


def test_a_killed_replay_leaves_consistent_books(tmp_path: Path, server: EventsServer) -> None:
    config = plugin(ingest_endpoint=server.url)
    quarantine_requests(tmp_path, config | INVALID, 300)
    run_until_empty(tmp_path)
    program = f"""
import orjson, sys, pathlib
from openmeter_plugin.maintenance import quarantine_replay
print(flush=True)
config = orjson.loads({orjson.dumps(config)!r})
quarantine_replay.replay_quarantine(pathlib.Path(sys.argv[1]), config, transaction_size=5)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        eventually(lambda: count(tmp_path, "metered", queue=QUARANTINE) > 0, what="the first transaction")
        os.kill(process.pid, signal.SIGKILL)
    assert_balanced(tmp_path)
    replay_quarantine(tmp_path, config)
    run_until_empty(tmp_path)
    assert len(server.taken) == 300
    assert set(server.came.values()) == {1}
    assert_balanced(tmp_path)
    assert waiting(tmp_path) == 0


def test_events_go_to_the_requests_own_queue_whatever_the_settings_name(
    tmp_path: Path, server: EventsServer
) -> None:
    quarantine_requests(
        tmp_path, plugin(ingest_endpoint=server.url, api_token="its-own") | WITHOUT_SUBJECT, 3
    )
    run_until_empty(tmp_path)
    corrected = plugin(ingest_endpoint="http://127.0.0.1:9/other", api_token="other", __plugin_id="another")
    assert replay_quarantine(tmp_path, corrected) == QuarantineReplay(metered=3, events=3)
    run_until_empty(tmp_path)
    assert len(server.taken) == 3
    assert {post.headers["authorization"] for post in server.posts} == {"Bearer its-own"}
    assert_balanced(tmp_path)


def test_a_replay_stores_no_token_if_the_environment_has_one(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-outside")
    config = plugin(ingest_endpoint=server.url, api_token="from-the-file")
    quarantine_requests(tmp_path, plugin() | INVALID, 1)
    run_until_empty(tmp_path)
    replay_quarantine(tmp_path, config)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"from-the-file" in path.read_bytes()]
    assert kept == []
    run_until_empty(tmp_path)
    assert [post.headers["authorization"] for post in server.posts] == ["Bearer from-outside"]
