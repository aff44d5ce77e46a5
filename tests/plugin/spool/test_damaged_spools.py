"""Spools with damaged, unreadable or foreign files: everything else is reported and delivered."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import structlog
from rich.console import Console

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.ledger import read_ledger
from openmeter_plugin.books.read_models import SpoolError
from openmeter_plugin.books.status import read_status
from openmeter_plugin.cli.drain import drain
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool import reader as reader_module
from openmeter_plugin.spool.destination import (
    QUARANTINE,
    queues_directory,
    read_destination,
    write_destination,
)
from openmeter_plugin.spool.segment import QUARANTINED, encode_record
from tests.harness.books import read_counts
from tests.plugin.deliveries import assert_balanced, ids, record, run_until_empty, spooled
from tests.plugin.events_server import EventsServer
from tests.plugin.spool_commands import TOKEN, printed, quarantine_record, run, run_process
from tests.plugin.spools import QUEUE, destination, segments

pytestmark = pytest.mark.slow


@pytest.fixture
def spool(tmp_path: Path, server: EventsServer) -> Path:
    """A spool with three waiting events, each in its own segment."""
    path = tmp_path / "spool"
    write_destination(path, destination(server.url, token=TOKEN))
    spooled(path, [record(n) for n in range(3)], each_alone=True)
    return path


def unreadable(spool: Path) -> Path:
    """Make every read of the second segment fail, even for root."""
    path = segments(spool)[1]
    path.rename(path.with_suffix(".original"))
    path.mkdir()
    (path / "so that it has a size").touch()
    return path


# Unreadable segments


def test_status_shows_an_unreadable_segment_and_all_others(spool: Path) -> None:
    unreadable(spool)
    total = printed("status", str(spool))["total"]
    assert (total["segments"], total["unreadable"], total["backlog"]) == (3, 1, 2)
    assert "3 segments (1 unreadable)" in run("status", str(spool)).stdout


def test_verify_names_an_unreadable_segment(spool: Path) -> None:
    name = unreadable(spool).name
    result = run("verify", str(spool))
    assert result.returncode == 1
    assert f"{QUEUE}: {name} cannot be read: " in result.stderr
    assert "2 records with 2 events" in result.stdout


@pytest.mark.parametrize("what", ["--all", "--waiting"])
def test_export_writes_all_readable_events_and_then_names_the_unreadable_segments(
    spool: Path, what: str
) -> None:
    name = unreadable(spool).name
    result = run("export", what, str(spool))
    assert result.returncode == 1
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [
        "event-000000",
        "event-000002",
    ]
    assert name in result.stderr


def test_export_of_the_quarantine_continues_after_an_unreadable_segment(tmp_path: Path) -> None:
    spooled(tmp_path, [quarantine_record(n) for n in range(3)], QUARANTINE, each_alone=True)
    path = segments(tmp_path, QUARANTINE)[0]
    path.unlink()
    path.mkdir()
    (path / "so that it has a size").touch()
    result = run("export", "--quarantine", str(tmp_path))
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 2)


def test_the_ledger_fails_rather_than_show_an_incomplete_hour_as_complete(spool: Path) -> None:
    unreadable(spool)
    with pytest.raises(SpoolError, match="segments that cannot be read"):
        read_ledger(spool)


def test_drain_delivers_what_it_can_and_keeps_an_unreadable_segment(
    spool: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", 0.01)
    path = unreadable(spool)
    logging = structlog.get_config()
    try:
        found = drain(DeliveryOptions(spool), Console(stderr=True), 20)
    finally:
        structlog.configure(**logging)
    assert sorted(server.taken) == ["event-000000", "event-000002"]
    assert path.with_name(f"{path.name}.unreadable").exists()
    assert (found.total.backlog, found.total.books.unreadable_segments) == (0, 1)


# Damaged books


def test_drain_renames_damaged_books_and_delivers(spool: Path, server: EventsServer) -> None:
    (spool / FILE).write_bytes(b"this is no database at all, " * 100)
    assert "serve, deliver or drain renames them" in run("status", str(spool)).stderr
    result = run_process("drain", str(spool))
    assert result.returncode == 0, result.stderr
    assert sorted(server.taken) == ids(range(3))
    assert [path for path in spool.iterdir() if path.name.startswith(f"{FILE}.damaged-")]
    assert verify(spool).ok


# Truncated, foreign or invalid files


@pytest.mark.parametrize("size", [0, 5])
def test_a_segment_cut_off_within_its_header_is_no_difference(spool: Path, size: int) -> None:
    (queues_directory(spool) / QUEUE / "00000000000000000001-1-0.seg").write_bytes(b"OMSPOOL1"[:size])
    assert verify(spool).ok, verify(spool).differences
    run_until_empty(spool)
    assert verify(spool).ok, verify(spool).differences


def test_a_segment_with_a_wrong_header_is_a_difference(spool: Path) -> None:
    (queues_directory(spool) / QUEUE / "00000000000000000001-1-0.seg").write_bytes(b"OMX")
    assert "does not start with a segment header" in " ".join(verify(spool).differences)


def test_a_file_among_the_queues_is_not_a_destination(spool: Path) -> None:
    (queues_directory(spool) / "notes.txt").write_text("not ours")
    assert [found.id for found in read_status(spool).destinations] == [QUEUE]


def test_a_quarantined_record_that_is_not_an_object_stops_nothing(spool: Path, server: EventsServer) -> None:
    spooled(spool, [encode_record(QUARANTINED + b"[]"), quarantine_record(1)], QUARANTINE)
    run_until_empty(spool)
    assert sorted(server.taken) == ids(range(3))
    assert read_counts(spool)[QUARANTINE]["quarantined", ""] == 2
    assert_balanced(spool)


@pytest.mark.parametrize(
    "description",
    [
        '{"id": "cut off',
        '{"id": "aaaabbbbccccdddd", "endpoint": 7}',
        '{"id": "aaaabbbbccccdddd", "endpoint": "http://h/x", "timeout": "soon"}',
        '{"id": "aaaabbbbccccdddd", "endpoint": "http://h/x", "max_batch_size": 0.5}',
        '{"id": "aaaabbbbccccdddd", "endpoint": "http://h/x", "ssl_verify": 0}',
    ],
)
def test_a_description_with_impossible_values_is_rejected(spool: Path, description: str) -> None:
    (queues_directory(spool) / QUEUE / "destination.json").write_text(description)
    with pytest.raises(ValueError, match=r"description|end of data"):
        read_destination(spool, QUEUE)


def test_drain_logs_an_unusable_description_and_accepts_an_address_instead(
    spool: Path, server: EventsServer
) -> None:
    (queues_directory(spool) / QUEUE / "destination.json").write_text('{"id": "q", "endpoint": 7}')
    result = run_process("drain", "--timeout", "0.5s", str(spool))
    assert (result.returncode, result.stdout[:34]) == (1, "0 events delivered, 3 left waiting")
    assert "delivery_held" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_process("drain", "--endpoint", server.url, str(spool)).returncode == 0
    assert sorted(server.taken) == ids(range(3))


# Options of drain and replay


@pytest.mark.parametrize(
    "address", ["openmeter:8888", "ftp://h/x", "http://user:secret@h/x", "http://h/x?token=secret"]
)
def test_drain_refuses_an_address_that_is_not_an_http_endpoint(spool: Path, address: str) -> None:
    result = run("drain", "--endpoint", address, str(spool))
    assert result.returncode == os.EX_USAGE
    assert result.stderr.startswith("openmeter-plugin: --endpoint: must ")
    assert "secret" not in result.stderr


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two\nlines", b"\xff\xfe"])
def test_drain_refuses_a_token_file_without_a_token(
    spool: Path, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    result = run("drain", "--token-file", str(file), str(spool))
    assert result.returncode == 1
    assert result.stderr.startswith("openmeter-plugin: --token-file: ")


def test_an_impossible_dead_letter_id_is_a_usage_error(spool: Path) -> None:
    result = run("replay", "--id", str(2**63), str(spool))
    assert result.returncode == os.EX_USAGE
    assert "Traceback" not in result.stderr


def test_a_replay_of_some_reports_how_many_stay_in_quarantine(spool: Path, tmp_path: Path) -> None:
    spooled(spool, [quarantine_record(n) for n in range(3)], QUARANTINE)
    run_until_empty(spool)
    config = tmp_path / "fixed.yaml"
    config.write_text(
        "ingest_endpoint: http://127.0.0.1:9/x\nsubject: {missing: fallback, fallback_subject: them}\n"
    )
    result = run("replay", "--quarantine", "--id", "2", "--config", str(config), str(spool))
    assert result.stdout == ("1 request became 1 event, to be delivered; 0 skipped, 2 still in quarantine\n")
