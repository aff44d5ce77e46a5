"""Responses of the HTTP API, over real HTTP to real processes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.api.app import _SCHEME
from tests.harness.process import eventually
from tests.plugin.operations_api import Api
from tests.plugin.spool_commands import run
from tests.plugin.spools import QUEUE

pytestmark = pytest.mark.slow

METRICS = {
    "openmeter_plugin_build_info": "gauge",
    "openmeter_plugin_books_readable": "gauge",
    "openmeter_plugin_requests": "counter",
    "openmeter_plugin_requests_metered": "counter",
    "openmeter_plugin_ai_usage_gaps": "counter",
    "openmeter_plugin_requests_skipped": "counter",
    "openmeter_plugin_requests_quarantined": "gauge",
    "openmeter_plugin_requests_resent": "counter",
    "openmeter_plugin_requests_lost": "counter",
    "openmeter_plugin_events_lost": "counter",
    "openmeter_plugin_books_violations": "counter",
    "openmeter_plugin_events_accepted": "counter",
    "openmeter_plugin_events_delivered": "counter",
    "openmeter_plugin_events_redelivered": "counter",
    "openmeter_plugin_ledger_events_pruned": "counter",
    "openmeter_plugin_backlog_events": "gauge",
    "openmeter_plugin_oldest_waiting_event_age_seconds": "gauge",
    "openmeter_plugin_dead_letters": "gauge",
    "openmeter_plugin_damaged_bytes": "counter",
    "openmeter_plugin_segments_unreadable": "counter",
    "openmeter_plugin_spool_bytes": "gauge",
    "openmeter_plugin_disk_free_bytes": "gauge",
    "openmeter_plugin_disk_size_bytes": "gauge",
    "openmeter_plugin_destination_info": "gauge",
    "openmeter_plugin_delivery_retries": "counter",
    "openmeter_plugin_delivery_failures_in_a_row": "gauge",
    "openmeter_plugin_delivery_held": "gauge",
    "openmeter_plugin_delivery_post_duration_seconds": "histogram",
    "openmeter_plugin_process_restarts": "counter",
}


def test_the_spool_is_returned_as_the_command_prints_it(running_api: Api) -> None:
    printed = json.loads(run("status", "--output=json", str(running_api.server.spool)).stdout)
    assert running_api.get("/v1/spool") == printed
    assert printed["delivery_running"] is True
    assert printed["total"]["books"]["delivered"] == 5
    assert printed["total"]["books"]["skipped"] == {"status_excluded": 1, "no_consumer": 1}


def ledger_line(hour: str, subject: str, accepted: int, delivered: int, dead: int) -> dict[str, Any]:
    return {
        "destination": QUEUE,
        "hour": hour,
        "type": "kong.api_request",
        "subject": subject,
        "accepted": accepted,
        "delivered": delivered,
        "dead_lettered": dead,
        "lost": 0,
        "waiting": 0,
    }


def test_the_ledger_is_returned_by_hour_and_subject(running_api: Api) -> None:
    assert running_api.get("/v1/ledger") == {
        "lines": [
            ledger_line("2026-11-20T05", "consumer:alice", 4, 3, 1),
            ledger_line("2026-11-22T07", "consumer:bob", 2, 2, 0),
        ],
        "hours_with_waiting_events": [],
        "pruned_up_to": None,
        "next": None,
    }


@pytest.mark.parametrize(
    ("parameters", "subjects"),
    [
        ({"subject": "consumer:bob"}, ["consumer:bob"]),
        ({"from": "2026-11-20T05:59:59Z", "to": "2026-11-20T06:00:00Z"}, ["consumer:alice"]),
        ({"from": "2026-11-20T06:00:00Z"}, ["consumer:bob"]),
        ({"from": "2026-11-22T08:59:00+01:00", "to": "2026-11-22T08:59:00+01:00"}, ["consumer:bob"]),
        ({"to": "2026-11-22T07:00:00Z"}, ["consumer:alice"]),
        ({"limit": 1}, ["consumer:alice"]),
    ],
)
def test_a_span_of_the_ledger_is_widened_to_whole_hours(
    running_api: Api, parameters: dict[str, str], subjects: list[str]
) -> None:
    assert [line["subject"] for line in running_api.get("/v1/ledger", **parameters)["lines"]] == subjects


def test_dead_letters_are_returned_in_pages(running_api: Api) -> None:
    page = running_api.get("/v1/dead-letters", limit=1)
    (letter,) = page["dead_letters"]
    assert (letter["event_id"], letter["status"]) == ("event-000003", 400)
    assert page["next"] is None
    assert running_api.get("/v1/dead-letters", after=letter["id"])["dead_letters"] == []


def test_the_api_is_a_page_without_scripts(running_api: Api) -> None:
    page = running_api.client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    paths = running_api.get("/openapi.json")["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert f"<code>{method.upper()} {path}</code>" in page.text
            assert all(answer["description"] for answer in operation["responses"].values())
    assert '<a href="#SpoolStatus">SpoolStatus</a>' in page.text
    assert '<h3 id="SpoolStatus">' in page.text


def test_the_openapi_document_describes_every_path(running_api: Api) -> None:
    description = running_api.get("/openapi.json")
    assert set(description["paths"]) == {
        "/v1/spool",
        "/v1/ledger",
        "/v1/dead-letters",
        "/v1/dead-letters/groups",
        "/v1/dead-letters/{number}",
        "/v1/dead-letters/replay",
        "/v1/replays",
        "/v1/replays/{number}",
        "/v1/quarantine",
        "/v1/quarantine/groups",
        "/v1/redeliver",
        "/v1/redeliver/{number}",
        "/v1/gate",
        "/v1/gate/overrides",
        "/metrics",
        "/healthz",
        "/readyz",
    }
    assert description["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer", "description": _SCHEME}
    }
    schemas = description["components"]["schemas"]
    assert {"SpoolStatus", "Ledger", "DeadLetters", "RedeliveryStatus", "Readiness", "Problem"} <= set(
        schemas
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("GET", "/v1/redeliver/4711", None, 404, "there is no redelivery with this id"),
        ("GET", "/v1/ledger?from=2026-11-22T07:00:00", None, 422, "from: needs a time zone"),
        ("GET", "/v1/ledger?from=yesterday", None, 422, "from: "),
        ("GET", "/v1/ledger?after=bogus", None, 422, "after must be"),
        ("GET", "/v1/dead-letters?limit=0", None, 422, "limit: "),
        ("POST", "/v1/redeliver", "{}", 422, "from: Field required"),
        (
            "POST",
            "/v1/redeliver",
            '{"from": "2026-11-22T07:00:00", "to": "2026-11-23T07:00:00Z"}',
            422,
            "from: ",
        ),
        (
            "POST",
            "/v1/redeliver",
            '{"from": "2026-11-23T07:00:00Z", "to": "2026-11-22T07:00:00Z"}',
            422,
            "before",
        ),
        ("POST", "/v1/redeliver", "no json", 422, "JSON"),
        ("POST", "/v1/dead-letters/replay", "{}", 422, "give exactly one of ids"),
        ("POST", "/v1/dead-letters/replay", '{"ids": [1], "all": true}', 422, "give exactly one of ids"),
        ("POST", "/v1/dead-letters/replay", '{"secret": "hunter2"}', 422, "secret: Extra inputs"),
        ("POST", "/v1/dead-letters/replay", " " * (1024 * 1024 + 1), 413, "1048576 bytes"),
        ("DELETE", "/v1/spool", None, 405, "Method Not Allowed"),
    ],
)
def test_every_error_is_a_problem_document_with_its_reason(
    running_api: Api, method: str, path: str, body: str | None, status: int, message: str
) -> None:
    answer = running_api.client.request(
        method, path, content=body, headers={"content-type": "application/json"} if body else None
    )
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert message in answer.json()["detail"]
    assert "hunter2" not in answer.text


def test_a_body_without_a_length_is_refused(running_api: Api) -> None:
    answer = running_api.client.post("/v1/redeliver", content=iter([b"{}"]))
    assert answer.status_code == 411


def test_the_metrics_are_complete_and_described(running_api: Api) -> None:
    text = running_api.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    found = {name.removesuffix("_total") if kind == "counter" else name: kind for name, kind in kinds.items()}
    assert found == METRICS
    assert all(f"# HELP {name} " in text for name in kinds)


def test_the_metrics_agree_with_the_books(running_api: Api) -> None:
    metrics = running_api.metrics()
    label = f'{{destination="{QUEUE}"}}'
    assert metrics[f"openmeter_plugin_requests_total{label}"] == 7
    assert metrics[f"openmeter_plugin_requests_metered_total{label}"] == 5
    assert metrics[f"openmeter_plugin_events_accepted_total{label}"] == 6
    assert metrics[f"openmeter_plugin_events_delivered_total{label}"] == 5
    assert metrics[f"openmeter_plugin_dead_letters{label}"] == 1
    assert metrics[f"openmeter_plugin_backlog_events{label}"] == 0
    assert metrics[f"openmeter_plugin_oldest_waiting_event_age_seconds{label}"] == 0
    skipped = f'openmeter_plugin_requests_skipped_total{{destination="{QUEUE}",reason="no_consumer"}}'
    assert metrics[skipped] == 1
    assert metrics[f"openmeter_plugin_delivery_post_duration_seconds_count{label}"] >= 1
    assert metrics[f"openmeter_plugin_delivery_failures_in_a_row{label}"] == 0
    assert metrics['openmeter_plugin_process_restarts_total{child="worker-0"}'] == 0
    assert metrics["openmeter_plugin_books_readable"] == 1
    disk = os.statvfs(running_api.server.spool)
    assert metrics["openmeter_plugin_disk_size_bytes"] == disk.f_blocks * disk.f_frsize
    assert 0 < metrics["openmeter_plugin_disk_free_bytes"] < metrics["openmeter_plugin_disk_size_bytes"]


def test_openmetrics_is_returned_on_request(running_api: Api) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = running_api.client.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_a_server_that_delivers_is_ready(running_api: Api) -> None:
    assert running_api.get("/healthz") == {"status": "ok"}
    eventually(lambda: running_api.client.get("/readyz").status_code == 200, what="readiness")
    assert running_api.get("/readyz") == {"ready": True, "problems": []}


def test_the_documentation_describes_every_metric() -> None:
    text = (Path(__file__).parents[3] / "docs" / "plugin-operations.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    suffixes = {"counter": "_total"}
    assert documented == {
        name.removeprefix("openmeter_plugin_") + suffixes.get(kind, "") for name, kind in METRICS.items()
    }
