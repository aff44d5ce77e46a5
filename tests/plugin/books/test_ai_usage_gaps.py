"""AI usage gaps in the books: each request whose usage Kong could not tell is counted once, by reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.books.status import read_status
from openmeter_plugin.instances.instance import start_instance
from openmeter_plugin.instances.record import spool_record, usage_record
from openmeter_plugin.maintenance.quarantine_replay import replay_quarantine
from openmeter_plugin.metering.ai_usage import AiUsageGap
from openmeter_plugin.metering.event import Event
from openmeter_plugin.metering.kong_log import QueryResults
from openmeter_plugin.spool.destination import write_destination
from openmeter_plugin.spool.segment import MAX_EVENTS, Record, encode_events
from tests.harness.process import eventually
from tests.plugin.deliveries import assert_balanced, run_until_empty, spooled
from tests.plugin.events_server import EventsServer
from tests.plugin.metering.test_ai_logs import logs
from tests.plugin.spools import destination, running_writer, scan

pytestmark = pytest.mark.slow

RECORDED = {
    "kong-3.9.1-ai-proxy": None,
    "kong-3.9.1-ai-proxy-stream": "ai_output_unknown",
    "kong-3.9.1-ai-proxy-stream-payloads-logged": "ai_usage_estimated",
    "kong-3.9.1-anthropic-no-statistics": "ai_statistics_off",
    "kong-3.9.1-anthropic-no-statistics-stream": "ai_statistics_off",
}
COUNTED = {"ai_output_unknown": 1, "ai_statistics_off": 2, "ai_usage_estimated": 1}


def configured(server: EventsServer, **changes: Any) -> dict[str, Any]:
    return {"ingest_endpoint": server.url, "__plugin_id": "the-plugin", **changes}


def metered(spool: Path, config: dict[str, Any], names: Any = RECORDED, *, times: int = 1) -> None:
    """Meter recorded requests as the plugin server does; Kong hands each over so many times."""
    written: list[Any] = []
    with running_writer(spool, written.extend) as writer:
        instance = start_instance(1, orjson.dumps(config), writer)
        for name in names:
            (log,) = logs(name)
            for _ in range(times):
                found = spool_record(instance, orjson.dumps(log), QueryResults(None, None))
                assert isinstance(found, tuple)
                writer.append(*found, None)
        eventually(lambda: len(written) == times * len(names))


def gaps(spool: Path) -> dict[str, int]:
    return read_status(spool).total.books.ai_usage_gaps


@pytest.mark.parametrize(
    "changes", [{}, {"ai_tokens": "split", "meter_ai_calls": True}], ids=["kong", "split"]
)
def test_a_request_is_counted_once_by_reason_however_often_kong_resends_it(
    tmp_path: Path, server: EventsServer, changes: dict[str, Any]
) -> None:
    metered(tmp_path, configured(server, **changes), times=2)
    run_until_empty(tmp_path)
    assert gaps(tmp_path) == COUNTED
    assert read_status(tmp_path).total.books.resent == len(RECORDED)
    assert_balanced(tmp_path)
    run_until_empty(tmp_path)  # the books outlive the process
    assert gaps(tmp_path) == COUNTED


def test_a_skipped_request_without_statistics_is_counted(tmp_path: Path, server: EventsServer) -> None:
    metered(tmp_path, configured(server, meter_api_requests=False))
    run_until_empty(tmp_path)
    assert gaps(tmp_path) == COUNTED
    assert read_status(tmp_path).total.books.skipped == {"ai_statistics_off": 2}


@pytest.mark.parametrize("meter_api_requests", [True, False])
def test_a_quarantined_request_is_counted_when_it_is_replayed(
    tmp_path: Path, server: EventsServer, meter_api_requests: bool
) -> None:
    invalid = {"attributes": [{"source": "constant", "event_property_name": "region"}]}
    metered(tmp_path, configured(server, **invalid))
    run_until_empty(tmp_path)
    assert gaps(tmp_path) == {}
    replay_quarantine(tmp_path, configured(server, meter_api_requests=meter_api_requests))
    assert gaps(tmp_path) == COUNTED
    run_until_empty(tmp_path)
    assert_balanced(tmp_path)


def event(number: int, **data: object) -> Event:
    time = "2026-11-22T05:49:03.779Z"
    return Event("1.0", f"r:{number}", "kong", "kong.llm_request", "alice", time, dict(data))


def test_a_record_without_a_summary_is_counted_by_its_events(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    found = [orjson.dumps({"id": "r", "subject": "\\ud800", "data": {"ai_usage_gap": "ai_output_unknown"}})]
    spooled(tmp_path, [encode_events(found), encode_events([b'{"id":"s","data":{"ai_usage_gap":[]}}'])])
    run_until_empty(tmp_path)
    assert gaps(tmp_path) == {"ai_output_unknown": 1}


def test_a_request_with_events_for_several_records_is_counted_once() -> None:
    events = [event(n, ai_usage_gap=AiUsageGap.USAGE_ESTIMATED) for n in range(MAX_EVENTS + 3)]
    events[1].data["ai_usage_gap"] = AiUsageGap.OUTPUT_UNKNOWN  # type: ignore[index]
    records = [item for item in scan(usage_record(events), 0, final=True) if isinstance(item, Record)]
    assert [record.summary and record.summary.gap for record in records] == ["ai_output_unknown", None]
    assert sum(record.event_count for record in records) == MAX_EVENTS + 3


def test_the_status_names_the_requests_by_reason(tmp_path: Path, server: EventsServer) -> None:
    metered(tmp_path, configured(server))
    run_until_empty(tmp_path)
    command = [sys.executable, "-m", "openmeter_plugin", "spool", "status", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "AI usage unknown" in shown
    assert "ai_statistics_off 2" in shown
    found = subprocess.run(
        [*command, "--output=json"], capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(found.stdout)["total"]["books"]["ai_usage_gaps"] == COUNTED
