"""Checks of free space: rare enough to be quick, frequent enough to leave space for other writers."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue

import pytest

from openmeter_plugin.spool.queue import Rotation, Segment, SpoolQueue, writable_bytes
from openmeter_plugin.spool.segment import SKIPPED, encode_record
from tests.plugin.spools import QUEUE, small_file_system

MIB = 1024 * 1024
RECORD = encode_record(SKIPPED + bytes(8 * 1024))


@pytest.mark.parametrize(
    ("file_system", "most"),
    [("1m", (MIB - MIB // 8) // 4), ("64m", MIB // 2)],
    ids=["a quarter of what is left on a small one", "half a MiB on a large one"],
)
def test_free_space_is_checked_again_after_a_bounded_number_of_bytes(
    tmp_path: Path, file_system: str, most: int
) -> None:
    with small_file_system(tmp_path / "disk", file_system) as spool:
        retired: SimpleQueue[Segment] = SimpleQueue()
        queue = SpoolQueue(spool, QUEUE, Rotation(16 * MIB, 3600.0, retired, sync_first=False))
        assert queue.append([RECORD]) == 1
        left = writable_bytes(queue.directory)
        written = 0
        while queue.append_quickly([RECORD]):
            written += len(RECORD)
        assert written <= min(most, left // 4)
        assert written > most // 2
        assert queue.append([RECORD]) == 1
        assert queue.append_quickly([RECORD]) == 1
        queue.retire()
        retired.get_nowait().close()
