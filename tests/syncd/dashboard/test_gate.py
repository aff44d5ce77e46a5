"""The page of the gates: whom they stop, who is close to the limit, overrides, and how old that is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.syncd.dashboard.gateways import FakeGateway, configured, gateway
from tests.syncd.dashboard.support import site, text_of
from tests.syncd.processes import Project

pytestmark = pytest.mark.slow

KEY = {"account": "c1", "subjects": ["consumer:bob"], "feature": "api", "reset": 0.0}
DENIED = KEY | {"reason": "USAGE_LIMIT_REACHED", "left": None, "quota": None}
CLOSE = KEY | {"subjects": ["consumer:eve"], "reason": None, "left": 42.0, "quota": 1000.0}
STOPPED = {"subject": "consumer:bob", "feature": "api", "reason": "USAGE_LIMIT_REACHED", "last_at": 1.0}
OVERRIDE = {"subject": "consumer:joe", "until": 1_800_000_000.0, "why": "<b>7</b>", "by": "ann", "since": 1.0}


def gate(mode: str) -> dict[str, Any]:
    figures = {"calls": [], "state_age": 1.5, "answer_age": 0.4, "kongs": []}
    return {
        "version": "1.0",
        "mode": mode,
        "features": ["api"],
        "subjects": 3,
        "denied": [DENIED],
        "denied_counts": [["api", "USAGE_LIMIT_REACHED", 1]],
        "close": [CLOSE],
        "stopped": [STOPPED | {"mode": mode, "count": 12}],
        "overrides": [OVERRIDE],
        "figures": figures,
        "last_error": "",
    }


def page_of(project: Project, fake: FakeGateway) -> str:
    with (
        gateway(fake) as there,
        site(project, extra=configured(eu=there.url)) as found,
        found.operator() as visitor,
    ):
        page = visitor.see("/dashboard/gate")
        assert "<b>7</b>" not in page
        return text_of(page)


@pytest.mark.parametrize(
    ("mode", "now", "outcome"),
    [
        ("enforce", "Stopped now", "stopped 12"),
        ("shadow", "Would be stopped", "would have been stopped 12"),
    ],
)
def test_the_page_shows_who_is_stopped_or_would_be_and_who_is_close_to_the_end(
    project: Project, mode: str, now: str, outcome: str
) -> None:
    page = page_of(project, FakeGateway(gate=gate(mode)))
    assert now in page
    assert "consumer:bob api USAGE_LIMIT_REACHED" in page
    assert "consumer:eve api 42 1,000" in page
    assert outcome in page
    assert "<b>7</b> ann" in page
    assert "Oldest reading" in page


def test_a_gateway_without_a_gate_says_so(project: Project) -> None:
    assert "This gateway has no gate" in page_of(project, FakeGateway())


def test_an_override_is_set_and_ended_by_the_forms_of_the_page(project: Project) -> None:
    fake = FakeGateway(gate=gate("enforce"))
    with (
        gateway(fake) as there,
        site(project, extra=configured(eu=there.url)) as found,
        found.operator() as visitor,
    ):
        wanted = {"subject": " consumer:bob ", "hours": "2.5", "why": "ticket 7", "by": "ann"}
        sent = visitor.send("/dashboard/gate/eu/allow", "/dashboard/gate", **wanted)
        assert (sent.status_code, sent.headers["location"]) == (303, "/dashboard/gate")
        sent = visitor.send("/dashboard/gate/eu/end", "/dashboard/gate", subject="consumer:joe")
        assert sent.status_code == 303
        assert fake.overrides == [
            {"subject": "consumer:bob", "seconds": 9000.0, "why": "ticket 7", "by": "ann"},
            {"ended": "consumer:joe"},
        ]


@pytest.mark.parametrize(
    "wrong", [{"hours": "0"}, {"hours": "745"}, {"hours": "nan"}, {"why": " "}, {"by": ""}]
)
def test_an_override_needs_a_subject_hours_a_reason_and_a_name(
    project: Project, wrong: dict[str, str]
) -> None:
    fake = FakeGateway(gate=gate("enforce"))
    with (
        gateway(fake) as there,
        site(project, extra=configured(eu=there.url)) as found,
        found.operator() as visitor,
    ):
        fields = {"subject": "consumer:bob", "hours": "2", "why": "ticket 7", "by": "ann"} | wrong
        assert visitor.send("/dashboard/gate/eu/allow", "/dashboard/gate", **fields).status_code == 400
        assert visitor.send("/dashboard/gate/us/allow", "/dashboard/gate", **fields).status_code in (400, 404)
        assert fake.overrides == []


def test_a_gateway_that_refuses_an_override_is_said_so(project: Project) -> None:
    fake = FakeGateway()
    with (
        gateway(fake) as there,
        site(project, extra=configured(eu=there.url)) as found,
        found.operator() as visitor,
    ):
        fields = {"subject": "consumer:bob", "hours": "2", "why": "ticket 7", "by": "ann"}
        sent = visitor.send("/dashboard/gate/eu/allow", "/dashboard/gate", **fields)
        assert sent.status_code == 502
        assert "runs without a gate" in sent.text
