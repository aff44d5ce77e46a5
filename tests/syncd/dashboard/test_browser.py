"""The dashboard in a real Chromium, used by an operator and by an attacker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from tests.syncd.dashboard.browser import Browser, browser
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway
from tests.syncd.dashboard.support import TOKEN, consumers, site
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send
from tests.syncd.servers import Answer, serving
from tests.syncd.targets import by_hand

pytestmark = pytest.mark.slow

OWNED = "<script>window.owned = 1; document.title = 'owned'</script>"
IMAGE = '"><img src=x onerror="window.owned = 1">'
PAGES = (
    "",
    "runs",
    "customers",
    "unbilled",
    "gateways",
    "gate",
    "dead-letters",
    "dead-letters/eu",
    "dead-letters/eu/1",
    "quarantine",
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def chromium(window: Browser) -> Browser:
    """The browser without state of an earlier test."""
    window.open("about:blank")
    window.driver.delete_all_cookies()
    window.complaints()
    return window


def log_in(chromium: Browser, url: str, token: str = TOKEN) -> None:
    chromium.open(f"{url}/")
    chromium.labelled("Token").send_keys(token)
    chromium.press("Log in")


def names(sandbox: httpx.Client) -> set[str]:
    return {item["name"] for item in sandbox.get("/api/v1/customers").json()["items"]}


def in_sync(chromium: Browser) -> str:
    return chromium.find(".verdict:nth-child(2)").text.replace("\n", " ")


def test_an_operator_logs_in_sees_drift_previews_and_applies_a_resync(
    project: Project, sandbox: httpx.Client, chromium: Browser
) -> None:
    with site(project) as found:
        consumers(project, "alice", "bob", "carol", "dave", tags={"alice": "acme", "bob": "acme"})
        with found.api() as client:
            client.post("/v1/syncs", json={"dry_run": True}).raise_for_status()
        log_in(chromium, found.url)
        chromium.until("to make, says the plan of")
        assert re.search(r"in sync\? No [1-9]\d* changes? to make", in_sync(chromium))

        chromium.press("Preview changes")
        chromium.until("Apply this plan?")
        assert "name dave" in chromium.text
        assert chromium.count("article.change.add ins") > 0
        assert "dave" not in names(sandbox), "a preview changes nothing"

        chromium.press("Apply")
        chromium.until("done")
        assert chromium.count("article .pill.ok") == chromium.count("article.change.add")
        assert "dave" in names(sandbox)

        chromium.follow("Overview")
        assert "Is everything in sync? Yes" in in_sync(chromium)
        assert chromium.complaints() == []

        chromium.press("Log out")
        assert chromium.path == "/dashboard/login"
        chromium.open(f"{found.url}/dashboard/customers")
        assert chromium.path == "/dashboard/login"


def test_a_wrong_token_opens_nothing(project: Project, chromium: Browser) -> None:
    with site(project) as found:
        log_in(chromium, found.url, "wrong")
        assert "Wrong token" in chromium.text
        chromium.open(f"{found.url}/dashboard/runs")
        assert chromium.path == "/dashboard/login"
        chromium.labelled("Token").send_keys(TOKEN)
        chromium.press("Log in")
        assert chromium.path == "/dashboard/runs", "the login continues to the requested page"


def test_a_forged_form_does_nothing(project: Project, sandbox: httpx.Client, chromium: Browser) -> None:
    """The attacker's page is on another port: cookies count that as the same site and are sent."""
    with site(project) as found:

        def attack(token: str) -> Answer:
            page = (
                f'<form id="f" method="post" action="{found.url}/dashboard/resync">'
                f'<input name="form_token" value="{token}"></form><script>f.submit()</script>'
            )
            return Answer(page.encode(), headers={"Content-Type": "text/html"})

        log_in(chromium, found.url)
        stolen = str(chromium.find("input[name=form_token]").get_attribute("value"))
        with serving(lambda asked: attack(stolen if asked.path == "/stolen" else "0" * 64)) as evil:
            for path in ("/guessed", "/stolen"):
                chromium.open(f"{evil.url}{path}")
                chromium.until("another origin")
            other_site = evil.url.replace("127.0.0.1", "localhost")
            chromium.open(f"{other_site}/stolen")
            chromium.until("another origin")
        chromium.open(f"{found.url}/dashboard/runs")
        assert chromium.count("main tbody tr") == 1, "only the daemon's own first run exists"
        assert "dashboard" not in chromium.find("main").text


def test_scripts_in_names_and_answers_do_nothing(
    project: Project, sandbox: httpx.Client, chromium: Browser
) -> None:
    by_hand(sandbox, name=OWNED, key=IMAGE)
    consumers(project, OWNED, IMAGE, "javascript:window.owned=1", "abc\u202egnp.exe")
    send(sandbox, event("1", subject=OWNED), event("2", subject=IMAGE))
    fake = FakeGateway(dead=[dead_letter(1, OWNED, subject=IMAGE, event_id=OWNED)])
    with gateway(fake) as there, site(project, extra=configured(eu=there.url)) as found:
        log_in(chromium, found.url)
        for path in (*PAGES, "customers?q=%3Cscript%3Ewindow.owned%3D1%3C%2Fscript%3E"):
            chromium.open(f"{found.url}/dashboard/{path}")
            assert chromium.evaluate("return window.owned") is None
            assert chromium.count("main script, main img, main [onerror]") == 0
            assert "owned" not in chromium.driver.title
        chromium.open(f"{found.url}/dashboard/customers/{quote(IMAGE, safe='')}")
        assert chromium.count("main script, main img, main [onerror]") == 0
        assert chromium.find("h1").text == OWNED, "it is shown as plain text"
        chromium.follow("Runs")
        chromium.follow(chromium.find("main tbody a").text)
        assert OWNED in chromium.text, "it is shown as plain text"
        assert "⟨U+202E⟩" in chromium.text or "(U+202E)" in chromium.text
        assert chromium.evaluate("return window.owned") is None
        assert chromium.complaints() == [], "not even the policy had anything to stop"


def test_the_policy_would_stop_a_script_that_got_through(project: Project, chromium: Browser) -> None:
    """Second line of defence: the policy also stops what escaping prevents."""
    with site(project) as found:
        chromium.open(f"{found.url}/dashboard/login")
        chromium.evaluate(
            "const script = document.createElement('script');"
            "script.textContent = 'window.owned = 1';"
            "document.body.append(script);"
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')"
        )
        assert chromium.evaluate("return window.owned") is None
        assert any("Content Security Policy" in complaint for complaint in chromium.complaints())


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_its_window(
    project: Project, sandbox: httpx.Client, chromium: Browser, width: int
) -> None:
    by_hand(sandbox, name="W" * 200, key="k" * 200)
    fake = FakeGateway(dead=[dead_letter(1, "x" * 300, subject="s" * 200)])
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    with gateway(fake) as there, site(project, extra=configured(eu=there.url)) as found:
        log_in(chromium, found.url)
        try:
            chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            for path in PAGES:
                chromium.open(f"{found.url}/dashboard/{path}")
                wide = chromium.evaluate("return document.documentElement.scrollWidth")
                assert wide <= width, path
            chromium.open(f"{found.url}/dashboard/customers/{'k' * 200}")
            assert chromium.evaluate("return document.documentElement.scrollWidth") <= width
        finally:
            chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_phone_captions_are_lines_and_values_stand_beside_their_labels(
    project: Project, chromium: Browser
) -> None:
    fake = FakeGateway(dead=[dead_letter(1, "an answer")])
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    with gateway(fake) as there, site(project, extra=configured(eu=there.url)) as found:
        log_in(chromium, found.url)
        try:
            chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            chromium.open(f"{found.url}/dashboard/gateways")
            assert chromium.find("caption").size["height"] < 40, "one letter per line before"
            chromium.open(f"{found.url}/dashboard/dead-letters/eu")
            label = chromium.find("td[data-label=Event]").location["x"] + 100
            for part in ("td[data-label=Event] .address", "td[data-label=Answer] bdi"):
                assert chromium.find(part).location["x"] > label, f"{part}: in the column of labels before"
        finally:
            chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
