"""Filters: which requests are metered, and the skip reasons of the others."""

from __future__ import annotations

from typing import Any

import pytest

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.metering.kong_log import NOT_QUERIED
from openmeter_plugin.metering.quarantine import redacted
from openmeter_plugin.metering.rules import SkipReason
from tests.harness.recordings import all_serialized, llm_request, protobuf_requests, serialized
from tests.plugin.outcomes import ECHO_ROUTE, authenticated, events, result


def filtered(log: object, **filters: Any) -> Any:
    _, rules = parse_config({"ingest_endpoint": "http://h/e", "filters": filters})
    return result(log, None, rules)


def with_status(status: object) -> dict[str, Any]:
    log = authenticated()
    log["response"]["status"] = status
    return log


@pytest.mark.parametrize(
    ("statuses", "metered"),
    [
        (["200-299"], {200, 299}),
        (["404"], {404}),
        ([404], {404}),
        (["200-299", "404"], {200, 299, 404}),
        (["200-200"], {200}),
        (["100-599"], {100, 199, 200, 299, 300, 404, 499, 599}),
        (["200-499"], {200, 299, 300, 404, 499}),
    ],
    ids=repr,
)
def test_a_status_in_the_list_is_metered(statuses: list[Any], metered: set[int]) -> None:
    for status in (100, 199, 200, 299, 300, 404, 499, 599):
        found = filtered(with_status(status), statuses=statuses)
        assert isinstance(found, list) if status in metered else found is SkipReason.STATUS_EXCLUDED


@pytest.mark.parametrize("status", [None, "", "soon", True, [], 200.6, -200])
def test_a_request_without_a_valid_status_is_excluded(status: object) -> None:
    assert filtered(with_status(status), statuses=["200-200"]) is SkipReason.STATUS_EXCLUDED


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"methods": ["GET"]}, None),
        ({"methods": ["get", "POST"]}, None),
        ({"methods": ["POST"]}, SkipReason.METHOD_EXCLUDED),
        ({"routes": ["echo"]}, None),
        ({"routes": ["other", ECHO_ROUTE]}, None),
        ({"routes": ["Echo"]}, SkipReason.ROUTE_EXCLUDED),
        ({"services": ["echo"]}, None),
        ({"services": ["adbd70b3-4224-5183-a52a-179d7b34ab5b"]}, None),
        ({"services": [ECHO_ROUTE]}, SkipReason.SERVICE_EXCLUDED),
        ({"response_sources": ["upstream"]}, None),
        ({"response_sources": ["kong", "upstream"]}, None),
        ({"response_sources": ["kong"]}, SkipReason.RESPONSE_SOURCE_EXCLUDED),
        ({"upstream_answered": True}, None),
        ({"routes": ["echo"], "methods": ["POST"]}, SkipReason.METHOD_EXCLUDED),
        ({"statuses": ["500"], "methods": ["POST"], "routes": ["no"]}, SkipReason.STATUS_EXCLUDED),
        ({}, None),
    ],
    ids=repr,
)
def test_each_list_has_its_own_skip_reason(filters: dict[str, Any], reason: SkipReason | None) -> None:
    found = filtered(authenticated(), **filters)
    assert found is reason if reason else isinstance(found, list)


@pytest.mark.parametrize(
    ("member", "filters", "reason"),
    [
        ("route", {"routes": ["echo"]}, SkipReason.ROUTE_EXCLUDED),
        ("service", {"services": ["echo"]}, SkipReason.SERVICE_EXCLUDED),
        ("request", {"methods": ["GET"]}, SkipReason.METHOD_EXCLUDED),
        ("source", {"response_sources": ["upstream"]}, SkipReason.RESPONSE_SOURCE_EXCLUDED),
        ("upstream_status", {"upstream_answered": True}, SkipReason.UNANSWERED_EXCLUDED),
    ],
)
def test_a_request_without_the_filtered_field_is_excluded(
    member: str, filters: dict[str, Any], reason: SkipReason
) -> None:
    log = authenticated()
    del log[member]
    assert filtered(log, **filters) is reason


def test_responses_of_kong_itself_can_be_excluded() -> None:
    assert (
        filtered(serialized("502-upstream-down").parsed, response_sources=["upstream"])
        is SkipReason.RESPONSE_SOURCE_EXCLUDED
    )


CLIENT_GONE = ("499-client-gone-before-answer", "400-client-gone-in-body")


@pytest.mark.parametrize("name", [*CLIENT_GONE, "502-upstream-down", "401-no-key"])
def test_a_request_that_the_upstream_did_not_answer_can_be_excluded(name: str) -> None:
    assert filtered(serialized(name).parsed, upstream_answered=True) is SkipReason.UNANSWERED_EXCLUDED


@pytest.mark.parametrize("name", CLIENT_GONE)
def test_a_client_that_is_gone_has_a_response_whose_source_is_the_upstream(
    name: str,
) -> None:
    log = serialized(name).parsed
    assert isinstance(filtered(log, statuses=["200-499"], response_sources=["upstream"]), list)


@pytest.mark.parametrize("name", ["authenticated", "upstream-404", "stream-sse", "head", "grpc-status-8"])
def test_an_answer_of_the_upstream_is_metered_also_if_it_is_an_error(name: str) -> None:
    assert len(filtered(serialized(name).parsed, upstream_answered=True)) == 1


ATTEMPTS: dict[bool, list[Any]] = {
    True: ["200", 200, 200.0, "101", "502, 200", "502 : 200", "- : 200", "-, 502", "502,200", " 200 ", "9"],
    False: ["-", "", None, 0, "0", "200, -", "200 : -", "502, ", ",", ":", "20x", "²", True, [], ["200"], {}],
}


@pytest.mark.parametrize(
    ("upstream_status", "answered"),
    [(status, answered) for answered, statuses in ATTEMPTS.items() for status in statuses],
    ids=repr,
)
def test_the_last_attempt_decides_whether_the_upstream_answered(
    upstream_status: object, answered: bool
) -> None:
    found = filtered(authenticated() | {"upstream_status": upstream_status}, upstream_answered=True)
    assert isinstance(found, list) if answered else found is SkipReason.UNANSWERED_EXCLUDED


def test_a_gateway_that_logs_no_source_of_the_response_has_answers_of_the_upstream_too() -> None:
    log = authenticated()
    del log["source"]
    assert isinstance(filtered(log, upstream_answered=True), list)


def test_the_tokens_of_an_excluded_request_are_excluded_with_it() -> None:
    assert filtered(llm_request().parsed, methods=["GET"]) is SkipReason.METHOD_EXCLUDED
    assert len(events(llm_request().parsed)) == 3


def test_an_excluded_request_needs_no_pdk_query_even_without_a_consumer() -> None:
    _, rules = parse_config(
        {
            "ingest_endpoint": "http://h/e",
            "filters": {"statuses": ["200-299"]},
            "application_context": "always",
        }
    )
    assert (
        result(serialized("401-no-key").parsed, NOT_QUERIED, rules, NOT_QUERIED) is SkipReason.STATUS_EXCLUDED
    )


def test_a_bad_record_is_not_filtered() -> None:
    assert filtered(None, statuses=["200"]) is SkipReason.BAD_RECORD


def test_the_instance_of_a_route_that_is_not_metered_makes_no_event_of_any_request() -> None:
    switches = ("meter_api_requests", "meter_ai_token_usage", "meter_agent_requests")
    _, rules = parse_config({"ingest_endpoint": "http://h/e"} | dict.fromkeys(switches, False))
    agent = authenticated() | {"ai": {"mcp": {"rpc": [{"method": "tools/call"}]}}}
    assert len(events(agent)) == 2
    logs = [agent, *(recording.parsed for recording in (*all_serialized(), *protobuf_requests()))]
    found = [result(log, None, rules) for log in logs]
    assert [type(one) for one in found] == [SkipReason] * len(logs)
    assert found[0] is SkipReason.NOTHING_TO_METER


def test_what_the_gate_stopped_is_never_metered_whatever_the_filters() -> None:
    log = with_status(402) | {"openmeter_gate": "USAGE_LIMIT_REACHED"}
    assert result(log) is SkipReason.GATE_STOPPED
    assert filtered(log, statuses=["402"]) is SkipReason.GATE_STOPPED
    assert filtered(log, statuses=["200"]) is SkipReason.GATE_STOPPED
    del log["openmeter_gate"]
    assert isinstance(filtered(log, statuses=["402"]), list)


@pytest.mark.parametrize("mark", [None, "", False, 1, {}])
def test_a_mark_that_the_gate_does_not_set_excludes_nothing(mark: object) -> None:
    assert isinstance(result(authenticated() | {"openmeter_gate": mark}), list)


def test_what_the_gate_stopped_stays_unbilled_when_it_is_replayed_from_the_quarantine() -> None:
    assert redacted(authenticated() | {"openmeter_gate": "STALE"})["openmeter_gate"] == "STALE"
