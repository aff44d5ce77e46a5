"""Kong segments as the Lua plugin writes them: real files, real locks, real failures."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.recordings import serialized
from tests.plugin.lua.stand_in import LuaPlugin, checked, lines, lost, records

SETTINGS: dict[str, Any] = {"ingest_endpoint": "http://openmeter/api/v1/events", "api_token": "the-token"}
LOG = serialized("authenticated").parsed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "segments"


@pytest.fixture
def plugin(folder: Path) -> LuaPlugin:
    return LuaPlugin(folder)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def is_locked(file: Path) -> bool:
    with file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Have writes of this process fail beyond a size: the one way to a full disk that needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Segments


def test_a_segment_begins_with_its_format_and_its_worker(plugin: LuaPlugin, folder: Path) -> None:
    plugin.log(plugin.lua(SETTINGS), LOG)
    (segment,) = segments(folder)
    head = json.loads(checked(segment.read_bytes().splitlines()[0]))
    worker = segment.name.removesuffix("-000001.segment")
    assert (head["format"], head["version"], head["worker"]) == ("openmeter-kong-segment", 1, worker)
    assert (head["kong"], head["created"]) == ("3.9.1", 1_800_000_000_000)
    assert segment.stat().st_mode & 0o777 == 0o640


def test_a_segment_is_locked_for_as_long_as_its_worker_appends_to_it(plugin: LuaPlugin, folder: Path) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    plugin.log(conf, LOG)
    assert is_locked(segments(folder)[0])
    plugin.now += 1
    plugin.log(conf, LOG)
    first, second = segments(folder)
    assert (is_locked(first), is_locked(second)) == (False, True)
    assert all(is_locked(file) for file in folder.glob("*.lost"))
    assert len(records(folder)) == 2


def test_a_worker_moves_on_to_the_next_segment_before_one_grows_too_large(
    plugin: LuaPlugin, folder: Path
) -> None:
    conf = plugin.lua(SETTINGS)
    for _ in range(2500):
        plugin.log(conf, LOG)
    sizes = [segment.stat().st_size for segment in segments(folder)]
    assert len(sizes) == 2
    assert 1_000_000 < sizes[0] <= 1_048_576
    assert len(lines(folder)) == 2500


def test_a_clock_that_is_set_back_only_makes_a_new_segment(plugin: LuaPlugin, folder: Path) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.log(conf, LOG)
    plugin.now -= 3600
    plugin.log(conf, LOG)
    assert (len(segments(folder)), len(lines(folder)), lost(folder)) == (2, 2, {})


def test_two_workers_never_write_to_the_same_file(folder: Path) -> None:
    for _ in range(2):
        plugin = LuaPlugin(folder)
        plugin.log(plugin.lua(SETTINGS), LOG)
    assert (len(segments(folder)), len(lines(folder))) == (2, 2)


# Instances


def instance_files(folder: Path) -> dict[str, Any]:
    return {
        file.stem: json.loads(checked(file.read_bytes().removesuffix(b"\n")))
        for file in (folder / "instances").iterdir()
    }


def test_an_instance_is_known_before_its_first_request(plugin: LuaPlugin, folder: Path) -> None:
    settings = SETTINGS | {"__plugin_id": "p", "__seq__": 7, "attributes": [], "units": None}
    conf = plugin.lua(settings)
    plugin.start(conf)
    ((instance_id, described),) = instance_files(folder).items()
    plugin.log(conf, LOG)
    assert records(folder)[0]["i"] == instance_id == described["id"]
    assert described["format"] == "openmeter-kong-instance"
    assert described["config"] == SETTINGS | {"__plugin_id": "p", "attributes": {}}
    assert not list(folder.rglob("*.tmp"))
    assert all(file.stat().st_mode & 0o777 == 0o640 for file in (folder / "instances").iterdir())


def test_an_id_means_one_configuration_in_each_worker_and_after_a_reload(folder: Path) -> None:
    first, second = LuaPlugin(folder), LuaPlugin(folder)
    first.start(first.lua(SETTINGS | {"__seq__": 1, "timeout": 5}))
    second.start(second.lua({"timeout": 5, "__seq__": 2, "__key__": "k"} | SETTINGS))
    assert len(instance_files(folder)) == 1
    for changed in ({"timeout": 6}, {"timeout": 5, "api_token": "other"}, {"timeout": 5, "__plugin_id": "q"}):
        second.start(second.lua(SETTINGS | changed))
    assert len(instance_files(folder)) == 4


def test_a_secret_that_a_vault_rotates_makes_a_new_instance(plugin: LuaPlugin, folder: Path) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.log(conf, LOG)
    conf[b"api_token"] = b"rotated"  # Kong changes the table that it has passed
    plugin.log(conf, LOG)
    ids = [record["i"] for record in records(folder)]
    tokens = {name: file["config"]["api_token"] for name, file in instance_files(folder).items()}
    assert [tokens[instance_id] for instance_id in ids] == ["the-token", "rotated"]


def test_a_configuration_that_comes_back_is_the_newest_again(plugin: LuaPlugin, folder: Path) -> None:
    created = []
    for token in ("a", "b", "a"):
        plugin.now += 10
        plugin.start(plugin.lua(SETTINGS | {"api_token": token}))
        newest = max(instance_files(folder).values(), key=lambda described: described["created"])
        created.append(newest["config"]["api_token"])
    assert created == ["a", "b", "a"]


def test_the_file_of_an_instance_that_was_deleted_is_written_again_with_the_next_segment(
    plugin: LuaPlugin, folder: Path
) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.log(conf, LOG)
    (file,) = (folder / "instances").iterdir()
    os.utime(file, (1, 1))
    plugin.now += 2
    plugin.log(conf, LOG)
    assert time.time() - file.stat().st_mtime < 3600  # touched: in use
    file.unlink()
    plugin.now += 2
    plugin.log(conf, LOG)
    assert file.exists()


# Lost records


def test_what_cannot_be_written_is_counted_and_the_next_record_is_whole(
    plugin: LuaPlugin, folder: Path
) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    plugin.log(conf, LOG)
    size = segments(folder)[0].stat().st_size
    for room in (0, 10, 300):  # none of the line, or a part of it
        with files_no_larger_than(size + room):
            plugin.log(conf, LOG)
        assert segments(folder)[0].stat().st_size == size
    plugin.log(conf, LOG)
    assert len(lines(folder)) == 2
    assert sum(lost(folder).values()) == 3
    assert [text for text in plugin.said if "1 (" in text]


def test_a_folder_that_cannot_be_made_loses_records_until_it_can(tmp_path: Path) -> None:
    parent = tmp_path / "not-yet"
    folder = parent / "segments"
    plugin = LuaPlugin(folder)
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    for _ in range(3):
        plugin.log(conf, LOG)
    parent.mkdir()
    plugin.log(conf, LOG)  # at most ten attempts a second
    assert not folder.exists()
    plugin.now += 0.2
    plugin.log(conf, LOG)
    assert (len(lines(folder)), lost(folder)) == (1, {"no_folder": 4})
    assert folder.stat().st_mode & 0o7777 == 0o2770


def test_a_place_where_nothing_may_be_written_is_named(tmp_path: Path) -> None:
    plugin = LuaPlugin(Path("/sys/kernel/segments"))
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    plugin.log(conf, LOG)
    (said,) = plugin.said
    assert "/sys/kernel/segments" in said
    assert "read_only" in said or "no_folder" in said


def test_records_of_a_segment_that_somebody_deleted_are_counted(plugin: LuaPlugin, folder: Path) -> None:
    conf = plugin.lua(SETTINGS)
    for _ in range(3):
        plugin.log(conf, LOG)
    segments(folder)[0].unlink()
    plugin.now += 2
    plugin.log(conf, LOG)
    assert (len(lines(folder)), lost(folder)) == (1, {"no_folder": 3})


def test_losses_are_counted_in_the_folder_that_replaces_a_deleted_one(
    plugin: LuaPlugin, folder: Path
) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    plugin.log(conf, LOG)
    shutil.rmtree(folder)
    plugin.now += 2
    plugin.log(conf, LOG)
    assert (len(lines(folder)), lost(folder)) == (1, {"no_folder": 1})
    assert all(is_locked(file) for file in folder.glob("*.lost"))


def test_a_file_that_was_left_without_its_name_does_not_stop_the_next_attempt(
    plugin: LuaPlugin, folder: Path
) -> None:
    """As after a file system that became read-only between the file's creation and its rename."""
    conf = plugin.lua(SETTINGS)
    plugin.log(conf, LOG)
    worker = segments(folder)[0].name.removesuffix("-000001.segment")
    (folder / f"{worker}-000002.segment.{worker}.tmp").touch()
    plugin.now += 2
    plugin.log(conf, LOG)
    assert (len(lines(folder)), lost(folder)) == (2, {})
    assert not list(folder.glob("*.tmp"))


def test_an_error_of_the_plugin_never_leaves_it_and_is_counted(plugin: LuaPlugin, folder: Path) -> None:
    conf = plugin.lua(SETTINGS)
    plugin.start(conf)
    good = plugin.globals[b"ngx"][b"req"][b"get_method"]
    plugin.globals[b"ngx"][b"req"][b"get_method"] = plugin.runtime.eval(b"function() error('broken') end")
    plugin.log(conf, LOG)
    plugin.globals[b"ngx"][b"req"][b"get_method"] = good
    plugin.log(conf, LOG)
    assert (len(lines(folder)), lost(folder)) == (1, {"internal_error": 1})
    assert "broken" in plugin.said[0]


def test_losses_are_in_kongs_error_log_once_a_minute(tmp_path: Path) -> None:
    plugin = LuaPlugin(tmp_path / "missing" / "segments")
    conf = plugin.lua(SETTINGS)
    for _ in range(130):
        plugin.now += 1
        plugin.log(conf, LOG)
    assert len(plugin.said) == 3
    assert " 60 (no_folder" in plugin.said[1]
