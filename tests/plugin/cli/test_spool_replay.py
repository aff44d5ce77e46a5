"""`openmeter-plugin spool replay`: dead letters and quarantined requests are delivered after all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmeter_plugin.books.status import read_status
from openmeter_plugin.maintenance.verify import verify
from tests.plugin.events_server import EventsServer, take_all
from tests.plugin.spool_commands import printed, run, run_process

pytestmark = pytest.mark.slow

CONFIG = """
ingest_endpoint: {url}
subject:
  look_up_value_in: consumer
  field: id
  missing: fallback
  fallback_subject: unassigned
"""


def test_replayed_dead_letters_are_delivered_by_the_next_delivery(
    history: Path, server: EventsServer
) -> None:
    server.script = take_all
    result = run("replay", "--all", str(history))
    assert (result.returncode, result.stdout) == (0, "1 dead letter will be replayed\n")
    assert "no delivery process is running" in result.stderr
    assert printed("dead-letters", str(history))["dead_letters"][0]["to_be_replayed"] is True
    assert run_process("drain", str(history)).returncode == 0
    assert "event-000003" in server.taken
    found = verify(history)
    assert found.ok, found.differences
    assert read_status(history).total.books.dead_lettered == 0


def test_only_the_selected_dead_letters_are_replayed(history: Path) -> None:
    assert run("replay", "--id", "4711", str(history)).stdout == "0 dead letters will be replayed\n"
    assert run("replay", "--id", "4711", "--id", "1", str(history)).stdout.startswith("1 dead letter ")


def test_quarantined_requests_become_events_under_corrected_settings(
    history: Path, server: EventsServer, tmp_path: Path
) -> None:
    config = tmp_path / "corrected.yaml"
    config.write_text(CONFIG.format(url=server.url))
    config.chmod(0o600)
    result = run("replay", "--quarantine", "--all", "--config", str(config), str(history))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("1 request became 1 event, to be delivered; 0 skipped, 0 still in quarantine\n")
    assert verify(history).ok, verify(history).differences
    assert run_process("drain", str(history)).returncode == 0
    assert "quarantined-1" in server.taken
    assert read_status(history).quarantined == 0
    assert verify(history).ok, verify(history).differences


@pytest.mark.parametrize(
    ("missing", "output"),
    [
        ("", "0 requests became 0 events, to be delivered; 0 skipped, 1 still in quarantine\n"),
        (
            "  missing: skip\n",
            "0 requests became 0 events, to be delivered; 1 skipped, 0 still in quarantine\n",
        ),
    ],
    ids=["settings that do not say", "settings that say skip"],
)
def test_a_request_without_a_subject_is_skipped_only_if_the_settings_say_so(
    history: Path, tmp_path: Path, missing: str, output: str
) -> None:
    config = tmp_path / "no-better.yaml"
    subject = f"subject:\n  look_up_value_in: consumer\n  field: custom_id\n  fallbacks: []\n{missing}"
    config.write_text(f"ingest_endpoint: http://127.0.0.1:9/events\n{subject}")
    config.chmod(0o600)
    result = run("replay", "--quarantine", "--all", "--config", str(config), str(history))
    assert result.stdout == output, result.stderr
    assert verify(history).ok, verify(history).differences


@pytest.mark.parametrize("arguments", [(), ("--all", "--id", "1")])
def test_a_replay_without_a_selection_is_a_usage_error(history: Path, arguments: tuple[str, ...]) -> None:
    assert run("replay", *arguments, str(history)).returncode == os.EX_USAGE


def test_a_replay_with_invalid_settings_says_why(history: Path, tmp_path: Path) -> None:
    result = run("replay", "--quarantine", "--all", "--config", str(tmp_path / "nothing.yaml"), str(history))
    assert result.returncode == 1
    assert result.stderr.startswith("openmeter-plugin: --config: ")
    assert "cannot be read" in result.stderr
