"""A spool of an earlier version is read, migrated and delivered: nothing lost, nothing counted twice."""

from __future__ import annotations

import sqlite3
import tarfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.books.database import FILE, VERSION, NewerBooksError, version_of
from openmeter_plugin.books.read_models import SpoolError
from openmeter_plugin.books.status import read_status
from openmeter_plugin.books.store import Books
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory
from tests.checkout import ROOT
from tests.plugin.deliveries import assert_balanced, count, ids, run_until_empty
from tests.plugin.events_server import EventsServer
from tests.plugin.spools import QUEUE

OTHER, HTTP_LOG = "bbbbccccddddeeee", "ecba9b66da8f0486"


@pytest.fixture
def earlier(tmp_path: Path, server: EventsServer) -> Path:
    """The spool in tests/data/spools, whose README says what is in it; all its endpoints are the server."""
    with tarfile.open(ROOT / "tests/data/spools/spool-0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    spool = tmp_path / "spool-0"
    for queue in (QUEUE, OTHER, HTTP_LOG):
        file = queues_directory(spool) / queue / "destination.json"
        file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"endpoint": server.url}))
    return spool


def version(spool: Path) -> int | None:
    with closing(sqlite3.connect(spool / FILE)) as db:
        return version_of(db)


def test_the_books_of_an_earlier_version_can_be_read_without_being_changed(earlier: Path) -> None:
    total = read_status(earlier).total
    assert (total.books.events, total.books.delivered, total.books.dead_lettered) == (26, 9, 2)
    assert (total.books.waiting, total.not_accounted.events, total.books.lost) == (15, 3, {"disk": 4})
    assert verify(earlier).differences == []
    assert version(earlier) == 0


def test_what_an_earlier_version_left_is_delivered_once(earlier: Path, server: EventsServer) -> None:
    run_until_empty(earlier)
    assert version(earlier) == VERSION
    of_http_log = [f"{number:032x}" for number in range(1, 6)]
    waiting = [*ids(range(20, 26), range(30, 33), range(40, 44)), *of_http_log]
    assert Counter(server.came) == Counter(waiting)
    assert [count(earlier, "waiting", queue=queue) for queue in (QUEUE, OTHER, HTTP_LOG)] == [0, 0, 0]
    assert count(earlier, "delivered") == 9 + 6 + 3
    assert (count(earlier, "dead_lettered"), count(earlier, "damaged_bytes")) == (2, 61)
    assert count(earlier, "quarantined", queue=QUARANTINE) == 2
    assert verify(earlier).differences == []
    assert_balanced(earlier)


def test_books_of_a_later_version_are_left_alone(earlier: Path) -> None:
    run_until_empty(earlier)
    with closing(sqlite3.connect(earlier / FILE)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(NewerBooksError, match="install the later version"):
        Books(earlier)
    with pytest.raises(SpoolError, match="a later version of openmeter-plugin wrote"):
        read_status(earlier)
    assert version(earlier) == VERSION + 1
    assert list(earlier.glob(f"{FILE}.damaged-*")) == []
