"""The customers table and the page of a customer in a real Chromium: wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.syncd.dashboard.axe import findings
from tests.syncd.dashboard.browser import Browser, browser
from tests.syncd.dashboard.gateways import FakeGateway, configured, gateway
from tests.syncd.dashboard.support import consumers, refresh_usage, site
from tests.syncd.dashboard.test_browser import log_in
from tests.syncd.dashboard.test_customers import subject
from tests.syncd.dashboard.test_gate import DENIED, gate
from tests.syncd.dashboard.test_pages import rerun
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, ok, send, tokens
from tests.syncd.targets import by_hand, subscribe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def looking(chromium: Browser, width: int, scheme: str) -> None:
    """Show pages in a window of this width, to a reader who prefers this colour scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_finance_finds_a_customer_and_reads_its_page_on_every_screen(
    project: Project, sandbox: httpx.Client, chromium: Browser
) -> None:
    """One world with all there is to show, so that each part of both pages is looked at."""
    by_hand(sandbox, name="Finance GmbH", key="w" * 150, usageAttribution={"subjectKeys": ["s" * 200]})
    fake = FakeGateway(gate=gate("enforce"))
    with gateway(fake) as there, site(project, extra=configured(eu=there.url)) as found:
        rerun(found)
        alice = subject(found, "alice")
        subscribe(sandbox, "acme")
        ok(
            sandbox.post(
                "/sandbox/v1/customers/acme/entitlements", json={"feature_key": "api", "allowance": 9}
            )
        )
        consumers(
            project, "alice", "bob", "carol", "late", tags=dict.fromkeys(("alice", "bob", "late"), "acme")
        )
        send(sandbox, event("1", subject=alice), tokens("2", 30, subject=alice), event("3", subject="acme"))
        fake.gate = gate("enforce") | {"denied": [DENIED | {"subjects": [alice]}], "overrides": []}
        rerun(found)
        refresh_usage(found)
        chromium.driver.delete_all_cookies()
        log_in(chromium, found.url)
        for width in (390, 1440):
            for scheme in ("light", "dark"):
                looking(chromium, width, scheme)
                for path in ("customers", "customers?q=late", "customers?q=nobody", "customers/acme"):
                    chromium.open(f"{found.url}/dashboard/{path}")
                    where = f"{path} at {width} px, {scheme}"
                    wide = chromium.evaluate("return document.documentElement.scrollWidth")
                    assert wide <= width, where
                    assert chromium.count("script") == 0, where
                    assert findings(chromium) == [], where
        chromium.open(f"{found.url}/dashboard/customers")
        chromium.labelled("Search").send_keys("late")
        chromium.press("Show")
        assert "acme" in chromium.text, "late is blocked, but acme is where it is meant to be"
        chromium.labelled("Search").clear()
        chromium.labelled("Search").send_keys("ALICE")
        chromium.press("Show")
        chromium.follow("acme")
        assert chromium.path == "/dashboard/customers/acme"
        for part in (
            "alice",
            "To be resolved",
            "subscription",
            "USAGE_LIMIT_REACHED",
            "create-customer",
        ):
            assert part in chromium.text, part
        chromium.follow("Customers")
        assert chromium.complaints() == []


def test_axe_would_find_a_field_without_a_label(project: Project, chromium: Browser) -> None:
    with site(project) as found:
        chromium.driver.delete_all_cookies()
        log_in(chromium, found.url)
        chromium.open(f"{found.url}/dashboard/customers")
        chromium.evaluate("document.querySelector('label[for=month]').remove()")
        assert [one for one in findings(chromium) if one.startswith("select-name")]
