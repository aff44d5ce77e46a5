"""Redelivery selects the delivered events of its span and sends them in batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from openmeter_plugin.books.replay import request_redelivery
from openmeter_plugin.books.store import Redelivery
from openmeter_plugin.delivery import redelivery as redelivery_module
from openmeter_plugin.delivery.redelivery import in_batches, selected_events
from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import MAGIC
from tests.plugin.deliveries import count, event, record, run_until_empty, spooled
from tests.plugin.events_server import EventsServer
from tests.plugin.spools import destination, segments

EVER = Redelivery(1, "2000-01-01T00:00:00.000Z", "2100-01-01T00:00:00.000Z", None)


def test_a_span_within_an_hour_selects_its_events_and_no_others(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n, time=f"2026-11-22T07:{n:02d}:00.000Z") for n in range(60)])
    run_until_empty(tmp_path)
    request_redelivery(tmp_path, "2026-11-22T07:10:00Z", "2026-11-22T07:20:00Z")
    run_until_empty(tmp_path)
    again = sorted(event_id for event_id, came in server.came.items() if came == 2)
    assert again == [f"event-{n:06d}" for n in range(10, 20)]
    assert count(tmp_path, "redelivered") == 10


def test_events_that_are_not_delivered_yet_are_not_redelivered(tmp_path: Path) -> None:
    spooled(tmp_path, [record(n) for n in range(4)])
    (segment,) = segments(tmp_path)
    half = len(MAGIC) + 2 * len(record(0))
    assert list(selected_events(segment, EVER, half)) == [event(0), event(1)]
    assert list(selected_events(segment, EVER, half, {half})) == [event(0)]
    assert list(selected_events(segment.with_name("gone.seg"), EVER, half)) == []


@pytest.mark.parametrize(("most", "sizes"), [(10, [4, 4, 2]), (3, [3, 3, 3, 1]), (1, [1] * 10)])
def test_a_batch_is_bounded_in_events_and_in_bytes(
    monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(redelivery_module, "MAX_BATCH_BYTES", 4 * len(event(0)))
    events = [event(n) for n in range(10)]
    batches = list(in_batches(events, most))
    assert [len(batch) for batch in batches] == sizes
    assert [one for batch in batches for one in batch] == events


def test_an_event_larger_than_the_limit_is_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redelivery_module, "MAX_BATCH_BYTES", 500)
    events = [event(0), event(1, pad="x" * 1000), event(2)]
    assert list(in_batches(events, 10)) == [[one] for one in events]
