"""The reader of Kong segments: each request reaches the spool exactly once, and nothing else is touched."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.segments import reader as reader_module
from openmeter_plugin.segments import sources
from openmeter_plugin.segments.folder import Directory, Folder
from openmeter_plugin.spool.destination import QUARANTINE, read_destination
from openmeter_plugin.spool.journal import Journal
from openmeter_plugin.spool.queue import Item
from openmeter_plugin.spool.segment import EVENTS, SKIPPED, Record
from tests.harness.books import read_counts
from tests.harness.kong_segments import (
    Worker,
    configuration,
    encode_head,
    encode_line,
    instance_id,
    request_line,
    write_segment,
)
from tests.plugin.deliveries import KEEP_NOTHING, run_until_empty
from tests.plugin.kong_segments import QUEUE, ids, lost, read_all, reading
from tests.plugin.spools import items

RECORDED = Path(__file__).parents[2] / "data" / "kong-segments"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "segments"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def segments_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.segment"))


def test_requests_reach_the_spool_while_their_worker_still_writes_the_segment(
    folder: Path, spool: Path
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(request_line(instance, "r1"))
    with reading(folder, spool) as reader:
        reader.step()
        assert ids(spool) == ["r1"]
        worker.write(request_line(instance, "r2"), request_line(instance, "r3")[:20])
        reader.step()
        assert ids(spool) == ["r1", "r2"]
        assert segments_in(folder) == [worker.path.name]


def test_segments_that_a_real_kong_wrote_are_read_to_the_last_request(folder: Path, spool: Path) -> None:
    shutil.copytree(RECORDED, folder, ignore=shutil.ignore_patterns("*.md", "logs.jsonl"))
    written = b"".join(path.read_bytes() for path in folder.glob("*.segment"))
    requests = written.count(b"\n") - len(segments_in(folder))
    read_all(folder, spool)
    assert segments_in(folder) == []
    found = [item for queue in (spool / "queues").iterdir() for item in items(spool, queue.name)]
    assert len(found) == requests > 100
    assert all(isinstance(item, Record) and item.kind in (EVENTS, SKIPPED) for item in found)
    events = [event for queue in (spool / "queues").iterdir() for event in ids(spool, queue.name)]
    assert len(events) > 50
    assert len(events) == len(set(events))
    assert lost(spool) == {}


def test_a_segment_is_removed_once_its_worker_has_moved_on_and_all_of_it_is_written(
    folder: Path, spool: Path
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(request_line(instance, "r1"))
    worker.move_on()
    worker.write(request_line(instance, "r2"))
    read_all(folder, spool)
    assert ids(spool) == ["r1", "r2"]
    assert segments_in(folder) == [worker.path.name]
    worker.end()
    read_all(folder, spool)
    assert segments_in(folder) == []
    assert ids(spool) == ["r1", "r2"]


def test_a_restarted_reader_goes_on_where_the_last_one_was(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    for number in range(5):
        worker.write(request_line(instance, f"r{number}"))
        read_all(folder, spool, steps=1)
    assert ids(spool) == [f"r{number}" for number in range(5)]


def test_a_request_of_an_unknown_configuration_waits_and_the_others_go_on(folder: Path, spool: Path) -> None:
    worker, other = Worker(folder), Worker(folder)
    config = configuration(source="later")
    known = worker.configure(configuration())
    with reading(folder, spool) as reader:
        worker.write(
            request_line(known, "r1"), request_line(instance_id(config), "r2"), request_line(known, "r3")
        )
        worker.move_on()
        worker.write(request_line(known, "r4"))
        other.write(request_line(known, "r5"))
        for _ in range(5):
            reader.step()
        assert sorted(ids(spool)) == ["r1", "r4", "r5"]
        worker.configure(config)
        time.sleep(0.25)  # an id that was missing is looked for again after this time
        for _ in range(5):
            reader.step()
    assert sorted(ids(spool)) == ["r1", "r2", "r3", "r4", "r5"]


def test_damaged_and_torn_lines_are_counted_as_lost_and_cost_no_other_request(
    folder: Path, spool: Path
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    damaged = bytearray(request_line(instance, "r2"))
    damaged[40] ^= 4
    content = encode_head() + request_line(instance, "r1") + damaged + request_line(instance, "r3")
    write_segment(folder, content + request_line(instance, "r4")[:50])
    read_all(folder, spool)
    assert ids(spool) == ["r1", "r3"]
    assert lost(spool) == {"damaged": 1, "torn": 1}
    assert segments_in(folder) == []


def test_a_damaged_head_costs_no_request(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    head = bytearray(encode_head())
    head[30] ^= 1
    write_segment(folder, bytes(head) + request_line(instance, "r1"))
    read_all(folder, spool)
    assert ids(spool) == ["r1"]
    assert lost(spool) == {}


def test_what_a_worker_could_not_write_is_counted_once_with_its_cause(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    worker.lose(disk_full=3)
    read_all(folder, spool)
    worker.lose(disk_full=5, no_folder=1)
    read_all(folder, spool)
    read_all(folder, spool)
    assert lost(spool) == {"disk_full": 5, "no_folder": 1}
    assert list(folder.glob("*.lost"))
    worker.end()
    with reading(folder, spool) as reader:
        for _ in range(2):
            reader._due.clear()
            reader.step()
    assert not list(folder.glob("*.lost"))
    assert lost(spool) == {"disk_full": 5, "no_folder": 1}


@pytest.mark.parametrize("written", range(5))
def test_a_reader_that_was_killed_while_it_wrote_a_batch_is_completed_by_the_next(
    folder: Path, spool: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the four records, `written` were in the spool; then the process was gone."""
    worker = Worker(folder)
    first = worker.configure(configuration())
    second = worker.configure(configuration("http://127.0.0.1:9/other"))
    worker.write(*[request_line((first, second)[n % 2], f"r{n}") for n in range(3)], b"torn\n")

    class KilledError(Exception):
        pass

    def killed(reader: reader_module.Reader, records: list[Item]) -> None:
        part = records[:written]
        if part:
            append(reader, part)
        raise KilledError

    append = reader_module.Reader._append
    monkeypatch.setattr(reader_module.Reader, "_append", killed)
    with pytest.raises(KilledError), reading(folder, spool, settle=False) as reader:
        reader.step()
    # The next one is killed as well, after one record more.
    written = 1
    with pytest.raises(KilledError), reading(folder, spool, settle=False) as reader:
        reader.step()
    monkeypatch.undo()
    worker.write(request_line(first, "r4"))
    read_all(folder, spool)
    other = next(path.name for path in (spool / "queues").iterdir() if path.name not in (QUEUE, QUARANTINE))
    assert ids(spool) == ["r0", "r2", "r4"]
    assert ids(spool, other) == ["r1"]
    assert lost(spool) == {"damaged": 1}


class KilledError(Exception):
    """The reader's process is gone."""


def killed_after(records: int, folder: Path, spool: Path) -> None:
    """Read as a process that is killed when it has written so many records of its batch."""
    append = reader_module.Reader._append

    def killed(reader: reader_module.Reader, batch: list[Item]) -> None:
        append(reader, batch[:records])
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module.Reader, "_append", killed)
        with pytest.raises(KilledError), reading(folder, spool, settle=False) as reader:
            reader.step()


def test_a_configuration_that_is_gone_after_a_kill_stops_only_the_segments_of_that_batch(
    folder: Path, spool: Path
) -> None:
    worker, other = Worker(folder), Worker(folder)
    config = configuration(source="second")
    first, second = worker.configure(configuration()), worker.configure(config)
    worker.write(*[request_line((first, second)[n % 2], f"r{n}") for n in range(4)])
    worker.lose(disk_full=3)
    killed_after(2, folder, spool)
    (folder / "instances" / f"{second}.json").unlink()
    worker.write(request_line(first, "r4"))
    worker.move_on()
    worker.write(request_line(first, "r5"))
    other.write(request_line(first, "o1"))
    read_all(folder, spool)
    worker.lose(disk_full=5)
    read_all(folder, spool)
    assert sorted(ids(spool)) == ["o1", "r0", "r1", "r5"]
    assert lost(spool) == {"disk_full": 2}
    other.write(request_line(first, "o2"))
    killed_after(1, folder, spool)
    worker.configure(config)
    read_all(folder, spool)
    read_all(folder, spool)
    assert sorted(ids(spool)) == ["o1", "o2", "r0", "r1", "r2", "r3", "r4", "r5"]
    assert lost(spool) == {"disk_full": 5}
    assert segments_in(folder) == sorted([worker.path.name, other.path.name])


def test_a_disk_that_is_full_when_a_batch_is_completed_doubles_nothing(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(*[request_line(instance, f"r{n}") for n in range(3)])
    killed_after(2, folder, spool)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with reading(folder, spool) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", full)
            with pytest.raises(OSError, match="No space"):
                reader.step()
        for _ in range(3):
            reader.step()
    assert ids(spool) == ["r0", "r1", "r2"]


def test_the_file_of_an_unused_configuration_is_removed_only_when_no_batch_needs_it(
    folder: Path, spool: Path
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    file = folder / "instances" / f"{instance}.json"
    worker.write(request_line(instance, "r1"))
    with reading(folder, spool, settle=False) as reader:
        reader.step()
        worker.write(request_line(instance, "r2"))
        reader.step()
        for _ in range(2):  # the first time it is loaded again
            os.utime(file, (1, 1))
            reader._due.clear()
            reader.step()
    assert not file.exists()
    worker.write(request_line(worker.configure(configuration(source="other")), "r3"))
    read_all(folder, spool)
    assert ids(spool) == ["r1", "r2", "r3"]


def test_a_kill_between_the_last_record_and_the_journal_writes_nothing_again(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(*[request_line(instance, f"r{n}") for n in range(3)])
    worker.end()
    worker.lose(disk_full=2)
    with reading(folder, spool, settle=False) as reader:
        monkeypatch.setattr(reader, "_remove", lambda _: None)
        reader.step()
    read_all(folder, spool)
    assert ids(spool) == ["r0", "r1", "r2"]
    assert lost(spool) == {"disk_full": 2}
    assert segments_in(folder) == []


def test_what_a_killed_reader_has_written_is_kept_until_the_next_one_has_counted_it(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(folder)
    worker.lose(disk_full=2)
    with reading(folder, spool, settle=False) as reader:
        monkeypatch.setattr(reader, "_remove", lambda _: None)
        reader.step()
    run_until_empty(spool, retention=KEEP_NOTHING)
    assert lost(spool) == {"disk_full": 2}
    read_all(folder, spool)
    run_until_empty(spool, retention=KEEP_NOTHING)
    assert not list(spool.glob("queues/*/*.seg"))
    assert read_counts(spool)[QUARANTINE]["lost", "disk_full"] == 2


def test_a_disk_that_refuses_the_journal_makes_requests_wait_and_no_more(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(folder)
    known = worker.configure(configuration())
    worker.write(request_line(known, "r1"), request_line("0" * 32, "r2"))
    worker.lose(disk_full=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with reading(folder, spool) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", full)
            for _ in range(3):
                reader._due.clear()
                with pytest.raises(OSError, match="No space"):
                    reader.step()
        reader._due.clear()
        for _ in range(3):
            reader.step()
    assert ids(spool) == ["r1"]
    assert lost(spool) == {"disk_full": 1}


def test_heartbeats_are_given_while_a_folder_of_many_names_is_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    for number in range(100):
        (folder / f"{number}.txt").touch()
    monkeypatch.setattr(sources, "_NAMES_TO_A_BEAT", 10)
    beats: list[int] = []
    opened = Folder(folder)
    assert opened.ready()
    sources.Sources().look(opened.files, lambda: beats.append(1))
    opened.close()
    assert len(beats) >= 10


def test_a_folder_with_many_segments_is_not_looked_through_for_each_of_them(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 of them, six were read in a second."""
    worker = Worker(folder)
    instance = worker.configure(configuration())
    for number in range(300):
        worker.write(request_line(instance, f"r{number}"))
        worker.move_on()
    names: list[str] = []
    listed = Directory.names

    def noted(directory: Directory) -> Iterator[str]:
        for name in listed(directory):
            names.append(name)
            yield name

    monkeypatch.setattr(Directory, "names", noted)
    read_all(folder, spool, steps=310)
    assert len(ids(spool)) == 300
    assert not segments_in(folder)
    assert len(names) < 20 * 300


def test_a_log_without_an_id_gets_the_same_one_when_it_is_read_again(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(request_line(instance, "", request={"method": "GET"}))
    read_all(folder, spool)
    (first,) = ids(spool)
    read_all(folder, spool.with_name("other"))
    assert ids(spool.with_name("other")) == [first]


def test_query_results_come_from_the_line(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    context = {"application_id": "a-1", "developer_id": "d", "organization_id": "o", "portal_id": "p"}
    line = request_line(
        instance,
        "r1",
        x={"shared": {"kaa_application_context": context}},
        consumer=None,
        authenticated_entity=None,
    )
    worker.write(line)
    read_all(folder, spool)
    (item,) = items(spool, QUEUE)
    assert isinstance(item, Record)
    assert orjson.loads(item.events)["subject"] == "app:a-1"


def test_the_backlog_of_an_earlier_configuration_does_not_bring_its_token_back(
    folder: Path, spool: Path
) -> None:
    worker = Worker(folder)
    now = time.time()
    earlier = worker.configure(configuration(api_token="old"), at=now - 100)
    worker.write(request_line(earlier, "r1"))
    worker.configure(configuration(api_token="new"), at=now - 50)
    read_all(folder, spool)
    destination = read_destination(spool, QUEUE)
    assert destination is not None
    assert destination.token == "new"
    assert ids(spool) == ["r1"]


def test_a_damaged_configuration_bills_nobody(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    path = folder / "instances" / f"{instance}.json"
    path.write_bytes(path.read_bytes().replace(b"plugin-1", b"plugin-2"))
    worker.write(request_line(instance, "r1"))
    read_all(folder, spool)
    assert not list(spool.glob("queues/*/*.seg"))
    assert segments_in(folder) == [worker.path.name]


def test_nothing_is_read_or_removed_but_plain_files_of_the_folder(
    folder: Path, spool: Path, tmp_path: Path
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    content = encode_head() + request_line(instance, "r1")
    outside = tmp_path / "outside.segment"
    outside.write_bytes(content)
    (folder / "1-1-aa-000001.segment").symlink_to(outside)
    os.mkfifo(folder / "1-1-aa-000002.segment")
    (folder / "1-1-aa-000003.segment").mkdir()
    (folder / "1-1-aa-000004.segment").hardlink_to(outside)
    (folder / "1-1-aa-000005.segment").write_bytes(b"somebody else's text\n" * 1000)
    (folder / "1-1-aa-000006.segment").write_bytes(encode_head(version=2) + request_line(instance, "r1"))
    (folder / "notes.txt").write_text("mine")
    (folder / "1-1-aa.lost").symlink_to(outside)
    os.mkfifo(folder / "1-2-aa.lost")
    before = sorted(path.name for path in folder.iterdir())
    started = time.monotonic()
    read_all(folder, spool)
    assert time.monotonic() - started < 5
    assert sorted(path.name for path in folder.iterdir()) == before
    assert outside.read_bytes() == content
    assert not list(spool.glob("queues/*/*.seg"))


def test_a_linked_folder_of_configurations_is_not_followed(folder: Path, spool: Path, tmp_path: Path) -> None:
    elsewhere = Worker(tmp_path / "elsewhere")
    instance = elsewhere.configure(configuration())
    folder.mkdir()
    (folder / "instances").symlink_to(tmp_path / "elsewhere" / "instances")
    (folder / "1-1-aa-000001.segment").write_bytes(encode_head() + request_line(instance, "r1"))
    read_all(folder, spool)
    assert not list(spool.glob("queues/*/*.seg"))


def test_a_line_without_end_costs_itself_and_is_not_held_in_memory(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    path = write_segment(folder, encode_head() + request_line(instance, "r1") + b"x")
    with path.open("r+b") as file:
        file.truncate(300 * 1024 * 1024)  # sparse
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + request_line(instance, "r2"))
    read_all(folder, spool)
    assert ids(spool) == ["r1", "r2"]
    assert lost(spool) == {"damaged": 1}
    assert segments_in(folder) == []


def test_a_folder_that_is_missing_is_made_for_the_group_of_the_one_above(folder: Path, spool: Path) -> None:
    read_all(folder, spool, steps=1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
    assert stat.S_IMODE((folder / "instances").stat().st_mode) == 0o2770


def test_a_folder_that_was_replaced_is_followed(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(request_line(instance, "r1"))
    with reading(folder, spool) as reader:
        reader.step()
        folder.rename(folder.with_name("old"))
        other = Worker(folder)
        other.configure(configuration())
        other.write(request_line(instance, "r2"))
        for _ in range(3):
            reader.step()
    assert ids(spool) == ["r1", "r2"]


def test_a_second_reader_of_the_folder_waits(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    with reading(folder, spool) as first:
        first.step()
        worker.write(request_line(instance, "r1"))
        read_all(folder, spool.with_name("other"))
        assert not (spool.with_name("other") / "queues").exists()
        first.step()
    assert ids(spool) == ["r1"]


def test_a_segment_that_cannot_be_removed_is_not_read_again(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    worker.write(request_line(instance, "r1"))
    worker.end()

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        for _ in range(3):
            read_all(folder, spool)
    assert segments_in(folder) == [worker.path.name]
    read_all(folder, spool)
    assert segments_in(folder) == []
    assert ids(spool) == ["r1"]


def test_a_payload_that_is_no_request_is_lost_and_counted(folder: Path, spool: Path) -> None:
    worker = Worker(folder)
    instance = worker.configure(configuration())
    bad = [encode_line(b"[]"), encode_line(b'{"log":{}}'), encode_line(b'{"i":"../../etc/passwd","log":{}}')]
    worker.write(*bad, request_line(instance, "r1"))
    read_all(folder, spool)
    assert ids(spool) == ["r1"]
    assert lost(spool) == {"damaged": 3}
