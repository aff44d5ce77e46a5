"""Destination descriptions: stored with the queue, with the token in a separate private file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.instances.instance import start_instance
from openmeter_plugin.spool.destination import (
    destination_id,
    queues_directory,
    read_destination,
    token_file,
    write_atomically,
    write_destination,
)
from tests.harness.process import eventually
from tests.plugin.spool_records import payload, record
from tests.plugin.spools import QUEUE, Acknowledged, Disk, destination, file_of, payloads, running_writer


def test_a_description_is_stored_with_its_queue_and_read_back_with_its_token(tmp_path: Path) -> None:
    described = destination("https://host/events", token="the-token", max_batch_size=7, ssl_verify=False)
    with running_writer(tmp_path) as writer:
        queue = writer.describe(described)
        assert queue is writer.queue(QUEUE)
    assert read_destination(tmp_path, QUEUE) == described


def test_a_file_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path, disk: Disk) -> None:
    write_destination(tmp_path, destination())
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "tokens" / QUEUE).mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_destination(tmp_path, destination(token="the-token"))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "tokens", tmp_path / "tokens" / QUEUE])


@pytest.mark.parametrize("token", ["", None])
def test_a_reference_that_kong_could_not_resolve_keeps_the_last_token_and_logs_it(
    tmp_path: Path, lines: list[Any], token: str | None
) -> None:
    reference = {"api_token": "{vault://env/token}"}
    config = {"ingest_endpoint": "http://127.0.0.1:9/events", "$refs": reference, "api_token": "resolved"}
    with running_writer(tmp_path) as writer:
        first = start_instance(1, orjson.dumps(config), writer)
        second = start_instance(2, orjson.dumps(config | {"api_token": token}), writer)
    assert first.queue is second.queue
    assert token_file(tmp_path, first.queue.id).read_text() == "resolved"
    assert [line["log_level"] for line in lines if line["event"] == "token_not_resolved"] == ["error"]
    with running_writer(tmp_path) as writer:
        start_instance(3, orjson.dumps(config | {"api_token": "rotated"}), writer)
    assert token_file(tmp_path, first.queue.id).read_text() == "rotated"


def test_description_and_token_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_destination(tmp_path, destination(token="the-token"))
    finally:
        os.umask(before)
    token = token_file(tmp_path, QUEUE)
    description = queues_directory(tmp_path) / QUEUE / "destination.json"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(description.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(description.parent.stat().st_mode) == 0o700


def test_the_token_is_in_no_file_but_its_own_and_in_no_repr(tmp_path: Path) -> None:
    described = destination(token="the-token")
    write_destination(tmp_path, described)
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and b"the-token" in p.read_bytes()]
    assert holding == [token_file(tmp_path, QUEUE)]
    assert "the-token" not in repr(described)


def test_a_new_token_replaces_the_old_one_and_no_token_removes_it(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="old"))
    write_destination(tmp_path, destination(token="new"))
    assert token_file(tmp_path, QUEUE).read_text() == "new"
    write_destination(tmp_path, destination(token=None))
    found = read_destination(tmp_path, QUEUE)
    assert found is not None
    assert found.token is None


def test_white_space_around_a_token_is_ignored(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="old"))
    token_file(tmp_path, QUEUE).write_text("  new\n")
    found = read_destination(tmp_path, QUEUE)
    assert found is not None
    assert found.token == "new"


def test_an_unchanged_description_leaves_the_files_alone(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="the-token"))
    files = [token_file(tmp_path, QUEUE), queues_directory(tmp_path) / QUEUE / "destination.json"]
    before = [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    write_destination(tmp_path, destination(token="the-token"))
    assert [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files] == before


def test_a_description_that_cannot_be_written_delays_no_record(tmp_path: Path) -> None:
    obstacle = tmp_path / "tokens"
    obstacle.write_text("in the way")
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        queue = writer.describe(destination(token="the-token"))
        writer.append(queue, record(1), 1)
        eventually(lambda: acknowledged.tokens == [1], what="the answers to Kong")
        assert payloads(tmp_path) == [payload(1)]
        obstacle.unlink()
        eventually(token_file(tmp_path, QUEUE).exists, what="the token's file")
    assert payloads(tmp_path) == [payload(1)]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "{}", '{"id": "x"}', '{"endpoint": "x"}'])
def test_a_damaged_description_is_a_value_error(tmp_path: Path, content: str) -> None:
    write_destination(tmp_path, destination())
    (queues_directory(tmp_path) / QUEUE / "destination.json").write_text(content)
    with pytest.raises(ValueError, match=r"\S"):
        read_destination(tmp_path, QUEUE)


def test_a_queue_without_a_description_has_no_destination(tmp_path: Path) -> None:
    assert read_destination(tmp_path, QUEUE) is None


def test_unknown_members_from_a_later_version_are_ignored(tmp_path: Path) -> None:
    write_destination(tmp_path, destination())
    file = queues_directory(tmp_path) / QUEUE / "destination.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"later": 1}))
    assert read_destination(tmp_path, QUEUE) == destination()


def test_endpoint_and_credential_identify_a_destination() -> None:
    ids = {destination_id(e, c) for e in ("http://a", "http://b") for c in ("", "plugin", "{vault://x}")}
    assert len(ids) == 6
    assert destination_id("http://a", "plugin") == destination_id("http://a", "plugin")


def test_a_new_description_is_synced_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "described"
    write_atomically(path, b"old")
    seen: list[tuple[bytes, bytes]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        seen.append((file_of(descriptor).read_bytes(), path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_atomically(path, b"new")
    assert seen == [(b"new", b"old")]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("max_batch_size", 0),
        ("timeout", 0),
        ("timeout", -1.0),
        ("keepalive", -1),
        ("max_coalescing_delay", 1e9),
        ("initial_retry_delay", 0),
        ("max_retry_delay", 0.0),
    ],
)
def test_a_description_with_a_value_out_of_range_is_refused_by_its_name(
    tmp_path: Path, name: str, value: float
) -> None:
    write_destination(tmp_path, destination())
    file = queues_directory(tmp_path) / QUEUE / "destination.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {name: value}))
    with pytest.raises(ValueError, match=rf"{name} is {value}, not .* to"):
        read_destination(tmp_path, QUEUE)
