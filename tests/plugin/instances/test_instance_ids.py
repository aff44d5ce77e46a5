"""Instance ids: none is ever assigned to two configurations, by whatever process."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from openmeter_plugin.instances.instance import InstanceIds

LARGEST = 2**31 - 1  # the protocol's int32


def test_servers_of_one_spool_never_assign_an_id_twice(tmp_path: Path) -> None:
    given = [next(ids) for ids in [InstanceIds(tmp_path) for _ in range(20)] for _ in range(3)]
    assert len(set(given)) == 60


def test_servers_that_start_at_the_same_moment_reserve_ids_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[int] = []
    ready = threading.Barrier(8)
    pread = os.pread

    def slow(descriptor: int, size: int, offset: int) -> bytes:
        content = pread(descriptor, size, offset)
        time.sleep(0.002)  # in which another would read the same without the lock
        return content

    monkeypatch.setattr(os, "pread", slow)

    def start() -> None:
        ready.wait(10)
        firsts.extend(next(InstanceIds(tmp_path)) for _ in range(10))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(firsts) == 80
    assert len(set(firsts)) == 80


def test_a_new_spool_under_a_running_kong_begins_with_other_ids_than_the_previous_one(
    tmp_path: Path,
) -> None:
    firsts = set()
    for name in "abcde":
        (tmp_path / name).mkdir()
        firsts.add(next(InstanceIds(tmp_path / name)))
    assert len(firsts) > 1


@pytest.mark.parametrize("content", [LARGEST, LARGEST - 4096, LARGEST + 1, 0, 10**30])
def test_no_id_is_larger_than_the_protocol_holds(tmp_path: Path, content: int) -> None:
    (tmp_path / "instance-ids").write_text(f"{content}\n")
    ids = InstanceIds(tmp_path)
    given = [next(ids) for _ in range(4096)]
    assert len(set(given)) == 4096
    assert min(given) > 0
    assert max(given) <= LARGEST


def test_ids_are_assigned_even_without_a_disk_to_reserve_them_on(tmp_path: Path) -> None:
    ids = InstanceIds(tmp_path / "not-there")
    given = [next(ids) for _ in range(10_000)]
    assert len(set(given)) == 10_000
    assert all(0 < number <= LARGEST for number in given)


def test_ids_that_run_low_are_reserved_before_they_run_out(tmp_path: Path) -> None:
    ids = InstanceIds(tmp_path)
    file = tmp_path / "instance-ids"
    reserved = file.read_text()
    for _ in range(3000):
        next(ids)
    ids.reserve()
    assert file.read_text() == reserved
    for _ in range(100):
        next(ids)
    ids.reserve()
    assert int(file.read_text().split()[0]) == int(reserved.split()[0]) + 4096


def test_a_damaged_file_of_reserved_ids_never_has_ids_assigned_again(tmp_path: Path) -> None:
    file = tmp_path / "instance-ids"
    file.write_text("20481\n")  # as servers before the checksum wrote it
    before = [next(InstanceIds(tmp_path)) for _ in range(3)]
    assert before == [20481, 24577, 28673]
    written = file.read_text()
    assert int(written.split()[0]) == 32769
    file.write_text(written.replace("0000032769", "0000012769"))
    again = next(InstanceIds(tmp_path))
    assert (again - 1) % 4096 == 0, "a random block, in which an id is as good as unique"
    assert again > 32769
