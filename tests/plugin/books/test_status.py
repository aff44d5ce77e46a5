"""The backlog read from segments, even while they are written and whatever they contain."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from openmeter_plugin.books import status
from openmeter_plugin.spool import reader
from openmeter_plugin.spool.destination import queues_directory
from openmeter_plugin.spool.queue import Segment
from openmeter_plugin.spool.reader import read_segment
from openmeter_plugin.spool.segment import LOST, Damage, Record, encode_record
from tests.plugin.deliveries import record
from tests.plugin.spools import QUEUE, segments


def new_segment(spool: Path) -> Segment:
    directory = queues_directory(spool) / QUEUE
    directory.mkdir(parents=True)
    return Segment(directory)


def test_a_record_that_a_live_writer_has_half_written_is_not_damage(tmp_path: Path) -> None:
    with closing(new_segment(tmp_path)) as segment:
        segment.append(record(0) + record(1)[:-5])
        (path,) = segments(tmp_path)
        (whole,) = read_segment(path)
        assert isinstance(whole, Record)
    _, torn = read_segment(path)
    assert torn == Damage(whole.end, whole.end + len(record(1)) - 5)


def test_records_larger_than_one_read_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_READ_SIZE", 50)
    with closing(new_segment(tmp_path)) as segment:
        segment.append(record(0) + record(1, pad="x" * 10_000) + record(2))
    (path,) = segments(tmp_path)
    found = [item for item in read_segment(path) if isinstance(item, Record)]
    assert [item.event_count for item in found] == [1, 1, 1]
    assert found[-1].end == path.stat().st_size


def test_losses_that_are_not_in_the_books_yet_are_counted_but_not_as_requests(tmp_path: Path) -> None:
    losses = [encode_record(LOST + b'{"count":%d,"reason":"disk"}' % number) for number in (3, 4)]
    with closing(new_segment(tmp_path)) as segment:
        segment.append(record(0, 1) + b"".join(losses) + encode_record(LOST + b"[]"))
    found = status.unaccounted(status.QueueFiles.of(tmp_path, QUEUE, {}))
    assert (found.requests, found.events, found.lost) == (1, 2, 7)
