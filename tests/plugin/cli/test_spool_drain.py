"""`openmeter-plugin spool drain`: delivery of an orphaned volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from openmeter_plugin.books.status import read_status
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, record, run_until_empty, spooled
from tests.plugin.events_server import EventsServer, serving
from tests.plugin.spool_commands import TOKEN, on_a_terminal, run_process
from tests.plugin.spools import QUEUE, destination, segments

pytestmark = pytest.mark.slow


def test_drain_delivers_an_orphaned_volume_and_exits_with_0(history: Path, server: EventsServer) -> None:
    result = run_process("drain", str(history))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "7 events delivered, 0 left waiting, 1 dead letter, 1 request in quarantine\n"
    assert set(server.taken) == {f"event-{n:06d}" for n in (0, 1, 2, 4, 5, 10, 11)}
    assert server.posts[-1].headers["authorization"] == f"Bearer {TOKEN}"
    assert segments(history), "nothing is removed"
    assert run_process("drain", str(history)).returncode == 0


def test_drain_shows_its_progress_on_a_terminal(history: Path) -> None:
    screen = on_a_terminal("drain", str(history))
    assert "events" in screen
    assert "7 events delivered, 0 left waiting" in screen


def test_drain_exits_with_1_if_events_are_left_after_the_timeout(tmp_path: Path) -> None:
    write_destination(tmp_path, destination("http://127.0.0.1:9/events"))
    spooled(tmp_path, [record(1), record(2)])
    result = run_process("drain", str(tmp_path), "--timeout", "0.5s")
    assert result.returncode == 1
    assert result.stdout.startswith("0 events delivered, 2 left waiting")
    assert "Traceback" not in result.stderr


def test_drain_sends_to_another_address_with_another_token(tmp_path: Path) -> None:
    write_destination(tmp_path / "spool", destination("http://127.0.0.1:9/events"))
    spooled(tmp_path / "spool", [record(1), record(2)])
    (tmp_path / "token").write_text("another-token\n")
    with serving() as server:
        options = ["--endpoint", server.url, "--token-file", str(tmp_path / "token")]
        result = run_process("drain", str(tmp_path / "spool"), *options)
        assert result.returncode == 0, result.stderr
        assert server.taken == ["event-000001", "event-000002"]
        assert server.posts[0].headers["authorization"] == "Bearer another-token"


def test_drain_does_not_send_several_destinations_to_one_address(tmp_path: Path) -> None:
    for queue in (QUEUE, "1111222233334444"):
        spooled(tmp_path, [record(1)], queue)
    result = run_process("drain", str(tmp_path), "--endpoint", "http://127.0.0.1:9/")
    assert result.returncode == 1
    assert "would send the events of several destinations to one address" in result.stderr


def test_drain_sends_to_another_address_if_only_one_destination_waits(
    history: Path, server: EventsServer
) -> None:
    spooled(history, [record(20)], "1111222233334444")
    write_destination(history, destination(server.url, id="1111222233334444"))
    run_until_empty(history)
    spooled(history, [record(21)])
    with serving() as other:
        result = run_process("drain", str(history), "--endpoint", other.url)
        assert result.returncode == 0, result.stderr
    assert other.taken == ["event-000021"]


def test_drain_refuses_a_spool_that_another_process_delivers(history: Path) -> None:
    with delivering(history):
        eventually(lambda: read_status(history).delivery_running, what="the lock")
        result = run_process("drain", str(history))
    assert result.returncode == 1
    assert "a delivery process is already running on this spool" in result.stderr
