"""Every page in a real Chromium, at 1440 and 390 px, in light and dark: no axe finding, no script.

The pages are found by following links from the overview, so a new page is tested without being listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import httpx
import pytest
from selenium.webdriver.common.by import By

from syncd.sandbox.testing import running_sandbox
from tests.syncd.dashboard import axe
from tests.syncd.dashboard.browser import SCHEMES, SIZES, Browser, browser, crawled, emulated
from tests.syncd.dashboard.gateways import (
    FakeGateway,
    configured,
    dead_letter,
    gateway,
    quarantined,
    replay,
)
from tests.syncd.dashboard.support import Site, consumers, site
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send, tokens
from tests.syncd.targets import by_hand, subscribe

pytestmark = pytest.mark.slow

# At least these; the rest is found.
EXPECTED: Final = {
    "",
    "close",
    "customers",
    "customers/KEY",
    "dead-letters",
    "dead-letters/eu",
    "dead-letters/eu/N",
    "dead-letters/eu/replays/N",
    "gate",
    "gateways",
    "quarantine",
    "quarantine/eu",
    "runs",
    "runs/ID",
    "unbilled",
    "usage",
}
_PRICES: Final = """
prices:
  currency: EUR
  rates: [{meter: kong_api_requests, amount: 0.1}, {meter: kong_llm_tokens, where: {type: input}, amount: 1}]
"""
PROBLEM: Final = "the request body has an error: property subject is missing"


@dataclass
class World:
    """A site with something on every page."""

    site: Site
    fake: FakeGateway
    pages: dict[str, str]
    """By kind, such as runs/ID, the path of one page of this kind."""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    letters = [dead_letter(n, "{}", title="Bad Request", detail=PROBLEM) for n in range(1, 8)]
    letters += [dead_letter(8, "older than 2 d", status=None), dead_letter(9, "x" * 300, subject="s" * 200)]
    letters[1]["to_be_replayed"] = True
    kept = [quarantined(n, consumer={"username": f"c{n}"}, route={"name": "orders"}) for n in range(1, 5)]
    kept.append(quarantined(9, "subject.field: must be one of id, username, custom_id, tag"))
    fake = FakeGateway(
        backlog=70,
        oldest_seconds=4000,
        dead=letters,
        kept=kept,
        quarantined=len(kept),
        lost={"disk_full": 2},
        replay=replay(4, marked=9, delivered=6, refused=1, waiting=2),
        event={"specversion": "1.0", "type": "kong.api_request", "data": {"route_name": "orders"}},
    )
    with running_sandbox() as url, httpx.Client(base_url=url, timeout=20) as sandbox, gateway(fake) as there:
        project = Project(tmp_path_factory.mktemp("world"), url)
        by_hand(sandbox, name="Initech (by hand)", key="initech")
        gone = configured(eu=there.url, us="http://127.0.0.1:9") + _PRICES
        with site(project, extra=gone) as found, found.operator() as visitor, found.api() as api:
            subscribe(sandbox, "acme")
            names = ("alice", "bob", "carol", "late", "erin", "new")
            consumers(
                project, *names, tags={"alice": "acme", "bob": "acme", "late": "acme", "erin": "initech"}
            )
            api.post("/v1/syncs", json={"dry_run": True}).raise_for_status()
            visitor.preview()
            changes = api.get("/v1/plan").json()["plan"]["changes"]
            keys = [key for change in changes for key in change["subject_keys"]]
            sent = [event(f"e{n}", subject=key) for n, key in enumerate((*keys, "healthcheck", "stranger"))]
            send(sandbox, *sent, tokens("t1", 1500, subject=keys[0]))
            assert found.running.usage.refresh().problem is None
            visitor.preview()
            yield World(found, fake, crawled(visitor.client))


def logged_in(window: Browser, world: World) -> None:
    window.open(f"{world.site.url}/dashboard/")
    if window.path.endswith("/login"):
        window.labelled("Token").send_keys("token-of-the-operator")
        window.press("Log in")


def test_every_page_of_the_menu_is_found(world: World) -> None:
    assert set(world.pages) >= EXPECTED


def test_axe_finds_what_is_wrong_with_a_page(window: Browser, world: World) -> None:
    logged_in(window, world)
    window.evaluate("document.querySelector('main').append(document.createElement('img'))")
    assert any(finding.startswith("image-alt") for finding in axe.findings(window))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_no_page_has_an_axe_finding_a_script_or_is_wider_than_its_window(
    window: Browser, world: World, size: str, scheme: str
) -> None:
    with emulated(window, size, scheme):
        logged_in(window, world)
        window.complaints()
        wrong = {}
        for kind, path in world.pages.items():
            # Without the refresh of a page about something under way, which would end the look at it.
            window.open(f"{world.site.url}{path}{'&' if '?' in path else '?'}live=off")
            assert "Internal error" not in window.driver.title, kind
            assert window.evaluate("return document.scripts.length") == 0, kind
            wide = window.evaluate("return document.documentElement.scrollWidth")
            findings = axe.findings(window)
            if wide > SIZES[size][0]:
                findings.append(f"{wide} px wide")
            if findings:
                wrong[kind] = findings
        assert wrong == {}
        assert window.complaints() == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_dead_letters_are_replayed_after_a_confirmation(
    window: Browser, world: World, size: str, scheme: str
) -> None:
    world.fake.replays.clear()
    with emulated(window, size, scheme):
        logged_in(window, world)
        window.follow("Dead letters")
        window.driver.find_element(By.XPATH, "//tr[contains(., 'Bad Request')]//summary").click()
        window.press("Replay 6 events")
        assert window.path == "/dashboard/dead-letters/eu/replays/4"
        assert "2 events are waiting for an answer" in window.text
        (asked,) = world.fake.replays
        assert asked["up_to"] == 7
        window.follow("Stop")
        assert axe.findings(window) == []


@pytest.mark.parametrize("size", SIZES)
def test_what_is_down_is_red_on_the_overview(window: Browser, world: World, size: str) -> None:
    with emulated(window, size, "light"):
        logged_in(window, world)
        assert "Not working: gateway us" in window.find("[role=alert]").text
        verdict = window.find(".verdict:nth-child(3)")
        assert "problem" in str(verdict.get_attribute("class"))
        red = verdict.find_element(By.CSS_SELECTOR, ".figure").value_of_css_property("color")
        assert re.match(r"rgba?\(166, 27, 40", red), red


def test_on_a_phone_the_three_answers_stand_below_each_other(window: Browser, world: World) -> None:
    with emulated(window, "phone", "light"):
        logged_in(window, world)
        places = [item.rect for item in window.driver.find_elements(By.CSS_SELECTOR, ".verdict")]
        assert [place["x"] for place in places] == [places[0]["x"]] * 3
        assert all(place["width"] > 300 for place in places)
