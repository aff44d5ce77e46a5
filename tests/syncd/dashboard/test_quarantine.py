"""The pages of the quarantine: by cause, with what to do, and without secrets."""

from __future__ import annotations

from typing import Any

import pytest

from openmeter_plugin.metering.kong_log import QueryResults
from openmeter_plugin.metering.quarantine import quarantine_record
from openmeter_plugin.metering.rules import SkipReason
from syncd.dashboard.quarantine import cause_of, request_view
from syncd.gateways.models import QuarantinedRequest
from tests.syncd.dashboard.gateways import FakeGateway, quarantined
from tests.syncd.dashboard.support import text_of
from tests.syncd.dashboard.test_pages import looking_at, row
from tests.syncd.processes import Project

PAGE = "/dashboard/quarantine"
_NEVER = {
    "status_excluded",
    "method_excluded",
    "route_excluded",
    "service_excluded",
    "response_source_excluded",
}
_NEVER |= {"unanswered_excluded", "gate_stopped", "nothing_to_meter", "ai_statistics_off", "bad_record"}
"""Skip reasons that are no missing subject, so no request is in quarantine because of them."""


@pytest.mark.parametrize("reason", [str(reason) for reason in SkipReason if reason not in _NEVER])
def test_each_reason_for_which_the_plugin_quarantines_has_words_and_a_cure(reason: str) -> None:
    cause = cause_of(reason)
    assert "invalid" not in cause.heading
    assert reason not in cause.heading
    assert cause.cure.endswith(".")


def test_the_quarantine_is_grouped_by_cause_with_what_to_do(project: Project) -> None:
    kept = [quarantined(n, consumer={"username": f"c{n}"}) for n in range(1, 4)]
    kept.append(quarantined(4, "subject.field: must be one of id, username"))
    with looking_at(project, FakeGateway(kept=kept, quarantined=4)) as visitor:
        page = visitor.see(PAGE)
        assert "eu 4 requests" in text_of(page)
        assert "View 3 requests 3" in row(page, "No consumer was authenticated")
        assert "Add an authentication plugin" in row(page, "No consumer was authenticated")
        invalid = "The plugin's configuration is invalid: subject.field: must be one of id, username"
        assert "Fix the setting in Kong" in row(page, invalid)
        assert "spool replay --quarantine --all" in page
        assert f'href="{PAGE}"' in visitor.see("/dashboard/gateways")


def test_quarantined_requests_are_listed_in_pages_with_what_is_kept(project: Project) -> None:
    log: dict[str, Any] = {
        "route": {"name": "orders"},
        "service": {"name": "shop"},
        "response": {"status": 201},
    }
    kept = [quarantined(n, consumer={"username": f"consumer-{n}"}, **log) for n in range(1, 61)]
    with looking_at(project, FakeGateway(kept=kept)) as visitor:
        first = visitor.see(f"{PAGE}/eu", reason="no_consumer")
        assert "consumer-7 orders shop 201 Show" in row(first, "7")
        assert "consumer-51" not in first
        assert "consumer-60" in visitor.see(f"{PAGE}/eu", reason="no_consumer", after="50")
        assert "none" in visitor.see(f"{PAGE}/eu", reason="no_header")
        assert visitor.client.get(f"{PAGE}/nobody", params={"reason": "x"}).status_code == 404


def test_a_gateway_that_cannot_be_read_is_named(project: Project) -> None:
    with looking_at(project, FakeGateway()) as visitor:
        assert "Every request has a payer" in visitor.see(PAGE)
    broken = FakeGateway(kept=[{"id": "no number", "reason": "no_consumer"}])
    with looking_at(project, broken) as visitor:
        assert "Cannot be read" in visitor.see(f"{PAGE}/eu", reason="no_consumer")


def test_what_is_shown_of_a_request_holds_no_credential() -> None:
    secret = "Bearer sk-secret-123"
    log = {
        "request": {
            "headers": {"authorization": secret},
            "querystring": {"apikey": secret},
            "uri": f"/?k={secret}",
        },
        "response": {"status": 200, "headers": {"set-cookie": secret}},
        "consumer": {"id": "c1"},
        "started_at": 1_763_790_000_000,
    }
    results = QueryResults(application=None, captures=None)
    record = quarantine_record("no_consumer", log, results, now_ms=1, new_id=lambda: "r1")
    request = QuarantinedRequest(
        id=1,
        reason="no_consumer",
        at="",
        destination=None,
        log=record["log"],
        application=None,
        attributes={},
    )
    view = request_view(request)
    assert (view.consumer, view.status, view.at is not None) == ("c1", "200", True)
    assert "secret" not in view.document


@pytest.mark.parametrize("started", [None, "now", 1e300, -1e300])
def test_an_odd_record_is_shown_nevertheless(started: object) -> None:
    log = {"started_at": started, "consumer": "none", "route": None}
    request = QuarantinedRequest(
        id=1, reason="x", at="", destination=None, log=log, application={"a": 1}, attributes={"b": 2}
    )
    assert request_view(request).at is None
