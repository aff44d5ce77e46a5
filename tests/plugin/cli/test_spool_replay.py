"""`openmeter-plugin spool replay`: what was refused or set aside is sent once its cause is mended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmeter_plugin.books.status import read_status
from openmeter_plugin.maintenance.verify import verify
from tests.plugin.events_server import EventsServer, take_all
from tests.plugin.spool_commands import printed, run, run_process

CONFIG = """
ingest_endpoint: {url}
subject:
  look_up_value_in: consumer
  field: id
  missing: fallback
  fallback_subject: unassigned
"""


def test_replayed_dead_letters_are_sent_by_the_next_delivery(history: Path, server: EventsServer) -> None:
    server.script = take_all
    result = run("replay", "--all", str(history))
    assert (result.returncode, result.stdout) == (0, "1 dead letters will be sent again\n")
    assert "no delivery is running" in result.stderr
    assert printed("dead-letters", str(history))["dead_letters"][0]["to_be_replayed"] is True
    assert run_process("drain", str(history)).returncode == 0
    assert "event-000003" in server.taken
    found = verify(history)
    assert found.ok, found.differences
    assert read_status(history).total.books.dead_lettered == 0


def test_only_the_dead_letters_that_are_named_are_replayed(history: Path) -> None:
    assert run("replay", "--id", "4711", str(history)).stdout == "0 dead letters will be sent again\n"
    assert run("replay", "--id", "4711", "--id", "1", str(history)).stdout.startswith("1 dead letters")


def test_what_was_set_aside_becomes_events_under_mended_settings(
    history: Path, server: EventsServer, tmp_path: Path
) -> None:
    config = tmp_path / "mended.yaml"
    config.write_text(CONFIG.format(url=server.url))
    config.chmod(0o600)
    result = run("replay", "--quarantine", "--all", "--config", str(config), str(history))
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "1 requests became 1 events, which will be sent; 0 were skipped, 0 stay in quarantine\n"
    )
    assert verify(history).ok, verify(history).differences
    assert run_process("drain", str(history)).returncode == 0
    assert "set-aside-1" in server.taken
    assert read_status(history).quarantined == 0
    assert verify(history).ok, verify(history).differences


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("", "0 requests became 0 events, which will be sent; 0 were skipped, 1 stay in quarantine\n"),
        (
            "  missing: skip\n",
            "0 requests became 0 events, which will be sent; 1 were skipped, 0 stay in quarantine\n",
        ),
    ],
    ids=["settings that do not say", "settings that say skip"],
)
def test_a_request_that_still_nobody_is_found_for_is_skipped_only_where_the_settings_say_so(
    history: Path, tmp_path: Path, missing: str, told: str
) -> None:
    config = tmp_path / "no-better.yaml"
    subject = f"subject:\n  look_up_value_in: consumer\n  field: custom_id\n  fallbacks: []\n{missing}"
    config.write_text(f"ingest_endpoint: http://127.0.0.1:9/events\n{subject}")
    config.chmod(0o600)
    result = run("replay", "--quarantine", "--all", "--config", str(config), str(history))
    assert result.stdout == told, result.stderr
    assert verify(history).ok, verify(history).differences


@pytest.mark.parametrize("arguments", [(), ("--all", "--id", "1")])
def test_a_replay_of_nothing_in_particular_is_a_usage_error(
    history: Path, arguments: tuple[str, ...]
) -> None:
    assert run("replay", *arguments, str(history)).returncode == os.EX_USAGE


def test_a_replay_with_settings_that_cannot_be_used_says_why(history: Path, tmp_path: Path) -> None:
    result = run("replay", "--quarantine", "--all", "--config", str(tmp_path / "nothing.yaml"), str(history))
    assert result.returncode == 1
    assert result.stderr.startswith("openmeter-plugin: --config: ")
    assert "cannot be read" in result.stderr
