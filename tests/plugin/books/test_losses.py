"""Events whose bytes are damaged or gone after they were accounted for: counted as lost, never silent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from openmeter_plugin.books.ledger import read_ledger
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool import reader as reader_module
from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import MAGIC
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, take_all
from tests.plugin.spool_commands import run
from tests.plugin.spools import destination, segments

pytestmark = pytest.mark.slow

SIZE = len(record(0, subject="alice"))


def accounted(spool: Path, server: EventsServer) -> None:
    """Write 40 events of two subjects and let the books count them while the endpoint is down."""
    server.script = lambda _: Answer(503)
    write_destination(spool, destination(server.url, max_batch_size=5))
    spooled(spool, [record(n, subject="alice" if n % 2 else "mario") for n in range(40)])
    with delivering(spool):
        eventually(lambda: waiting(spool) == 40, what="the accounting")
    server.script = take_all


def flip(path: Path, at: int) -> int:
    content = path.read_bytes()
    return path.write_bytes(content[:at] + bytes((content[at] ^ 0x20,)) + content[at + 1 :])


def in_record(number: int) -> int:
    return len(MAGIC) + number * SIZE + SIZE // 2


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda path: flip(path, in_record(7)), range(7, 8)),
        (lambda path: flip(path, in_record(0)), range(1)),
        (lambda path: flip(path, in_record(39)), range(39, 40)),
        (lambda path: [flip(path, in_record(number)) for number in (10, 11, 12)], range(10, 13)),
        (lambda path: os.truncate(path, len(MAGIC) + 30 * SIZE), range(30, 40)),
        (lambda path: os.truncate(path, len(MAGIC) + 30 * SIZE + 9), range(30, 40)),
        (lambda path: os.truncate(path, 3), range(40)),
        (lambda path: path.unlink(), range(40)),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), range(40)),
    ],
    ids=["one", "first", "last", "three", "cut", "cut in a record", "cut to nothing", "removed", "zeros"],
)
@pytest.mark.parametrize("drains", [True, False], ids=["drain", "serve"])
def test_events_damaged_between_accounting_and_delivery_are_counted_as_lost(
    tmp_path: Path, server: EventsServer, damage: Callable[[Path], object], lost: range, drains: bool
) -> None:
    accounted(tmp_path, server)
    (path,) = segments(tmp_path)
    damage(path)
    with structlog.testing.capture_logs() as lines:
        if drains:
            run_until_empty(tmp_path)
        else:
            with delivering(tmp_path):
                eventually(lambda: waiting(tmp_path) == 0, what="the end of the backlog")
    reason = "damaged" if path.exists() else "missing"
    assert set(server.taken) == set(ids(range(40))) - set(ids(lost))
    assert (delivered(tmp_path), waiting(tmp_path)) == (40 - len(lost), 0)
    assert count(tmp_path, "lost_events", reason) == len(lost)
    (alarm,) = [line for line in lines if line["event"] == "events_lost"]
    assert (alarm["log_level"], alarm["events"], alarm["segments"]) == ("critical", len(lost), [path.name])
    by_subject = {line.subject: line.lost for line in read_ledger(tmp_path).lines}
    assert by_subject == {
        "alice": sum(number % 2 for number in lost),
        "mario": sum(1 - number % 2 for number in lost),
    }
    assert read_ledger(tmp_path).hours_with_waiting_events == []
    assert f"+ lost {len(lost)} ({reason} {len(lost)})" in run("status", str(tmp_path)).stdout
    assert_balanced(tmp_path)


def test_damage_is_reported_by_verify_before_delivery_finds_it_and_not_after(
    tmp_path: Path, server: EventsServer
) -> None:
    accounted(tmp_path, server)
    flip(segments(tmp_path)[0], in_record(7))
    found = verify(tmp_path)
    assert any("were damaged before delivery" in difference for difference in found.differences)
    assert any("40 events wait by the counts, but 39" in difference for difference in found.differences)
    run_until_empty(tmp_path)
    assert verify(tmp_path).differences == []


def test_damaged_bytes_are_set_aside(tmp_path: Path, server: EventsServer) -> None:
    accounted(tmp_path, server)
    (path,) = segments(tmp_path)
    flip(path, in_record(7))
    start = len(MAGIC) + 7 * SIZE
    run_until_empty(tmp_path)
    (copy,) = (tmp_path / "damaged").iterdir()
    assert copy.read_bytes() == path.read_bytes()[start : start + SIZE]
    assert count(tmp_path, "damaged_bytes") == SIZE


def test_what_is_delivered_of_a_damaged_file_that_somebody_removed_is_not_lost_too(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_READ_SIZE", 6 * SIZE)  # so that the file is open to the end
    accounted(tmp_path, server)
    (path,) = segments(tmp_path)
    server.script = lambda _: Answer(503)
    server.posts.clear()
    with delivering(tmp_path):
        eventually(lambda: server.posts, what="a try, with the file open")
        flip(path, in_record(30))
        path.unlink()
        server.script = take_all
        eventually(lambda: waiting(tmp_path) == 0, what="the end of the backlog")
    lost = count(tmp_path, "lost_events", "damaged") + count(tmp_path, "lost_events", "missing")
    assert (delivered(tmp_path), lost) == (len(set(server.taken)), 40 - len(set(server.taken)))
    assert_balanced(tmp_path)


def test_losses_are_counted_once_whatever_restarts_in_between(tmp_path: Path, server: EventsServer) -> None:
    accounted(tmp_path, server)
    flip(segments(tmp_path)[0], in_record(20))
    server.script = lambda _: Answer(503)
    for _ in range(3):
        with delivering(tmp_path):
            eventually(lambda: server.posts, what="a try")
            server.posts.clear()
    server.script = take_all
    for _ in range(2):
        run_until_empty(tmp_path)
    assert (count(tmp_path, "lost_events", "damaged"), delivered(tmp_path)) == (1, 39)
    assert_balanced(tmp_path)


def test_a_loss_in_one_segment_leaves_the_events_of_the_others_alone(
    tmp_path: Path, server: EventsServer
) -> None:
    accounted(tmp_path, server)
    spooled(tmp_path, [record(n, subject="alice") for n in range(40, 60)], each_alone=True)
    flip(segments(tmp_path)[0], in_record(8))
    segments(tmp_path)[5].unlink()  # not in the books yet, so that no book knows of it
    run_until_empty(tmp_path)
    assert (count(tmp_path, "lost_events", "damaged"), delivered(tmp_path)) == (1, 58)
    assert len(set(server.taken)) == 58
    assert_balanced(tmp_path)
