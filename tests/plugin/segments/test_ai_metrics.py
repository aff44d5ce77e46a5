"""Calls to models that Kong counted but did not log: Lua in Kong hands the counts over beside the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.instances.instance import start_instance
from openmeter_plugin.segments.conversion import convert
from openmeter_plugin.spool.segment import Record
from tests.harness.kong_segments import encode_line
from tests.plugin.metering.test_ai_logs import logs
from tests.plugin.spools import running_writer, scan

METRICS = {
    "llm_prompt_tokens_count": 25,
    "llm_completion_tokens_count": 41,
    "llm_usage_cost": 0.00069,
    "llm_e2e_latency": 11,
}
"""ngx.ctx.ai_llm_metrics of a real Kong 3.9.1 after the recorded call; the provider said 25 and 41."""


def converted(tmp_path: Path, log: dict[str, Any], metrics: object) -> list[dict[str, Any]]:
    payload = orjson.dumps({"i": "the-instance", "log": log, "x": {"ai_metrics": metrics}})
    with running_writer(tmp_path) as writer:
        config = {"ingest_endpoint": "http://127.0.0.1:9/events", "__plugin_id": "p", "meter_ai_calls": True}
        instance = start_instance(1, orjson.dumps(config), writer)
        ((_, record),) = convert(encode_line(payload), 8, lambda _: instance, final=True).records
    (found,) = scan(record, 0, final=True)
    assert isinstance(found, Record)
    events: list[dict[str, Any]] = orjson.loads(b"[" + found.events + b"]")
    return events


def usage(events: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    names = ("tokens", "type", "model", "provider", "cost", "llm_latency_ms", "ai_usage_gap")
    return [(event["type"], *map(event["data"].get, names)) for event in events]


def test_a_call_without_statistics_is_billed_for_what_the_provider_used(tmp_path: Path) -> None:
    (log,) = logs("kong-3.9.1-anthropic-no-statistics")
    model = ("claude-sonnet-4", "anthropic")
    events = converted(tmp_path, log, METRICS)
    assert usage(events) == [
        ("kong.api_request", *[None] * 7),
        ("kong.llm_request", 25, "input", *model, None, None, None),
        ("kong.llm_request", 41, "output", *model, None, None, None),
        ("kong.llm_call", 66, None, *model, 0.00069, 11, None),
    ]
    (logged,) = logs("kong-3.9.1-anthropic")
    ids = [event["id"].partition(":")[2] for event in converted(tmp_path, logged, METRICS)]
    assert [event["id"].partition(":")[2] for event in events] == ids


def test_what_kong_logged_wins_over_its_metrics(tmp_path: Path) -> None:
    (log,) = logs("kong-3.9.1-anthropic")
    other = METRICS | {"llm_prompt_tokens_count": 7}
    assert [event["data"].get("tokens") for event in converted(tmp_path, log, other)] == [None, 25, 41, 66]


@pytest.mark.parametrize(
    "metrics", [{"llm_usage_cost": 0, "llm_e2e_latency": 2}, {}, None, "x", [1], METRICS]
)
def test_a_stream_whose_metrics_have_no_counts_stays_unknown(tmp_path: Path, metrics: object) -> None:
    (log,) = logs("kong-3.9.1-anthropic-no-statistics-stream")
    events = converted(tmp_path, log, metrics)
    gaps = [event["data"].get("ai_usage_gap") for event in events]
    assert gaps == ([None] * 4 if metrics == METRICS else ["ai_statistics_off"])


def test_a_request_that_no_ai_plugin_answered_is_not_changed_by_metrics(tmp_path: Path) -> None:
    (log,) = logs("kong-3.9.1-anthropic-400")
    assert [event["type"] for event in converted(tmp_path, log, METRICS)] == ["kong.api_request"]
