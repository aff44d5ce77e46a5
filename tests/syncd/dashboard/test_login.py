"""Login, sessions and response headers, over real HTTP to a real daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.core.errors import ConfigError
from syncd.dashboard import session
from syncd.sandbox.testing import running_sandbox
from tests.syncd.dashboard.support import TOKEN, Site, form_token, site, text_of
from tests.syncd.processes import Project

pytestmark = pytest.mark.slow

PAGES = ("/", "/runs", "/runs/x", "/customers", "/unbilled", "/gateways", "/dead-letters/x")
FORMS = ("/resync", "/runs/x/apply", "/logout")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One daemon for all tests that do not change it."""
    with running_sandbox() as url, site(Project(tmp_path_factory.mktemp("site"), url)) as found:
        yield found


def cookie(answer: httpx.Response) -> str:
    (found,) = answer.headers.get_list("set-cookie")
    return str(found)


def test_the_root_redirects_to_the_dashboard(there: Site) -> None:
    with there.visitor() as visitor:
        for path in ("/", "/dashboard"):
            answer = visitor.client.get(path)
            assert (answer.status_code, answer.headers["location"]) == (307, "/dashboard/")


@pytest.mark.parametrize("page", PAGES)
def test_without_a_login_every_page_redirects_to_it_and_back(there: Site, page: str) -> None:
    with there.visitor() as visitor:
        answer = visitor.client.get(f"/dashboard{page}?page=2")
        assert answer.status_code == 303
        login = answer.headers["location"]
        assert login.startswith("/dashboard/login?next=")
        assert answer.text == ""
        login_page = visitor.see(login)
        place = re.search(r'name="next" value="([^"]+)"', login_page)
        assert place
        assert place[1] == f"/dashboard{page}?page=2"


@pytest.mark.parametrize("form", FORMS)
def test_without_a_login_no_form_does_anything(there: Site, form: str) -> None:
    with there.visitor() as visitor:
        token = form_token(visitor.see("/dashboard/login"))
        answer = visitor.client.post(f"/dashboard{form}", data={"form_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/login")


def test_the_right_token_opens_a_session(there: Site) -> None:
    with there.visitor() as visitor:
        answer = visitor.log_in(place="/dashboard/runs?page=2")
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/runs?page=2")
        assert "Overview" in visitor.see()
        assert visitor.client.get("/dashboard/login").headers["location"] == "/dashboard/"


def test_the_cookie_holds_a_random_id_that_scripts_and_other_sites_do_not_get(there: Site) -> None:
    with there.visitor() as visitor:
        before = cookie(visitor.client.get("/dashboard/login"))
        after = cookie(visitor.log_in())
    pattern = r"syncd-session=[A-Za-z0-9_-]{43}; HttpOnly; Path=/; SameSite=strict"
    assert re.fullmatch(pattern, before)
    assert re.fullmatch(pattern, after)
    assert TOKEN not in after
    assert before.split(";")[0] != after.split(";")[0], "an id from before the login must not be logged in"


def test_a_wrong_token_opens_nothing(there: Site) -> None:
    for wrong in ("wrong", "", TOKEN[:-1], TOKEN + "x", "für"):
        with there.visitor() as visitor:
            answer = visitor.log_in(wrong)
            page = text_of(answer.text)
            assert answer.status_code == 403
            assert "Wrong token" in page
            assert visitor.client.get("/dashboard/").status_code == 303
            visitor.log_in()


@pytest.mark.parametrize(
    "place", ["https://evil.example/", "//evil.example/", "/dashboard\\evil", "/v1/status", "/dashboardx", ""]
)
def test_a_login_redirects_only_to_the_dashboard(there: Site, place: str) -> None:
    with there.visitor() as visitor:
        assert visitor.log_in(place=place).headers["location"] == "/dashboard/"


def test_a_planted_id_is_not_logged_in_by_its_victim(there: Site) -> None:
    planted = session.new_id()
    with there.visitor(cookie=f"syncd-session={planted}") as victim:
        page = victim.see("/dashboard/login")
        victim.client.post("/dashboard/login", data={"form_token": form_token(page), "token": TOKEN})
    with there.visitor(cookie=f"syncd-session={planted}") as attacker:
        assert attacker.client.get("/dashboard/").status_code == 303


def test_a_logout_ends_the_session_everywhere(there: Site) -> None:
    with there.operator() as visitor:
        copied = dict(visitor.client.cookies)
        answer = visitor.send("/dashboard/logout")
        assert answer.headers["location"] == "/dashboard/login"
        with httpx.Client(base_url=there.url, cookies=copied) as thief:
            assert thief.get("/dashboard/").status_code == 303


def test_a_session_ends_without_requests(project: Project) -> None:
    with site(project, session_idle=0.0) as found, found.visitor() as visitor:
        visitor.log_in()
        assert visitor.client.get("/dashboard/").headers["location"] == "/dashboard/login"


def test_a_changed_token_ends_all_sessions(tmp_path: Path, sandbox: httpx.Client) -> None:
    project = Project(tmp_path, str(sandbox.base_url))
    with site(project) as found, found.operator() as visitor:
        visitor.see()
        text = project.config.read_text().replace(TOKEN, "another-token-of-the-daemon")
        project.config.write_text(text)
        found.running.reload(lambda: settings.load(project.config))
        assert visitor.client.get("/dashboard/").status_code == 303
        assert visitor.log_in("another-token-of-the-daemon").headers["location"] == "/dashboard/"


def test_wrong_tokens_are_limited_and_the_right_one_still_logs_in(project: Project) -> None:
    with site(project) as found, found.visitor() as visitor:
        assert [visitor.log_in("wrong").status_code for _ in range(5)] == [403] * 5
        answer = visitor.log_in("wrong")
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "Too many wrong tokens" in answer.text
        assert visitor.client.get("/dashboard/").status_code == 303
        assert visitor.log_in().headers["location"] == "/dashboard/"
        assert visitor.client.get("/dashboard/").status_code == 200


def test_a_forged_header_allows_no_further_attempts(project: Project) -> None:
    with site(project) as found:
        codes = []
        for number in range(6):
            with found.visitor(**{"x-forwarded-for": f"203.0.113.{number}"}) as visitor:
                codes.append(visitor.log_in("wrong").status_code)
    assert codes == [403] * 5 + [429]


def test_the_token_is_on_no_page(there: Site) -> None:
    with there.operator() as visitor:
        for path in ("/dashboard/", "/dashboard/runs", "/dashboard/customers", "/dashboard/gateways"):
            assert TOKEN not in visitor.see(path)


HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none';"
        " base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
}


@pytest.mark.parametrize("path", ["/", "/login", "/runs/unknown", "/nowhere", "/static/nothing", "/resync"])
def test_every_answer_carries_the_headers(there: Site, path: str) -> None:
    with there.operator() as visitor:
        for answer in (
            visitor.client.get(f"/dashboard{path}"),
            visitor.client.post(f"/dashboard{path}", data={"form_token": "x"}),
        ):
            assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, answer.status_code


def test_the_style_sheet_may_be_cached_because_its_url_changes_with_it(there: Site) -> None:
    with there.visitor() as visitor:
        page = visitor.see("/dashboard/login")
        found = re.search(r'href="(/dashboard/static/dashboard\.css\?v=[0-9a-f]{12})"', page)
        assert found
        answer = visitor.client.get(found[1])
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in answer.headers["cache-control"]


def test_no_page_loads_third_party_scripts(there: Site) -> None:
    with there.api() as client:
        assert client.get("/redoc").status_code == 404
        page = client.get("/docs")
        assert "script" not in page.text.lower().replace("description", "")
        assert "src=" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_link_from_another_site_keeps_the_session(there: Site) -> None:
    """For such a link browsers withhold the SameSite=Strict cookie."""
    with there.operator() as visitor:
        with there.visitor(**{"sec-fetch-site": "cross-site"}) as browser:
            for path in ("/dashboard/runs?page=2", "/dashboard/login"):
                answer = browser.client.get(path)
                assert answer.status_code == 200
                assert "set-cookie" not in answer.headers
                assert '<meta http-equiv="refresh" content="0">' in answer.text
                assert f'href="{path}"' in answer.text
        assert "Overview" in visitor.see()


def test_over_https_the_cookie_is_sent_over_https_only(project: Project) -> None:
    extra = ", public_url: 'https://syncd.example.com'"
    with site(project, daemon=extra) as found, found.visitor() as visitor:
        answer = visitor.client.get("/dashboard/login")
        assert re.fullmatch(
            r"__Host-syncd-session=[A-Za-z0-9_-]{43}; HttpOnly; Path=/; SameSite=strict; Secure",
            cookie(answer),
        )
        # httpx never sends a Secure cookie over http, so the test sets it by hand:
        secure_cookie = cookie(answer).split(";")[0]
        logged_in = visitor.client.post(
            "/dashboard/login",
            data={"form_token": form_token(answer.text), "token": TOKEN},
            headers={"cookie": secure_cookie, "origin": "https://syncd.example.com"},
        )
        assert logged_in.status_code == 303
        opened = {"cookie": cookie(logged_in).split(";")[0]}
        assert visitor.client.get("/dashboard/", headers=opened).status_code == 200


def test_a_public_address_without_a_token_is_refused_at_the_start(project: Project) -> None:
    project.configure("daemon: {public_url: 'https://syncd.example.com'}\n")
    with pytest.raises(ConfigError, match="token must be set"):
        settings.load(project.config)


def test_the_dashboard_can_be_disabled(project: Project) -> None:
    with site(project, daemon=", dashboard: false") as found, found.visitor() as visitor:
        assert visitor.client.get("/dashboard/").status_code == 404
        assert visitor.client.get("/").status_code == 404


# Without a token, on loopback


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_sandbox() as url:
        project = Project(tmp_path_factory.mktemp("open"), url)
        with site(project, token=None) as found:
            yield found


def test_without_a_token_no_login_is_needed(open_to_all: Site) -> None:
    with open_to_all.visitor() as visitor:
        page = visitor.see()
        assert "Preview changes" in page
        assert "Log out" not in page
        assert visitor.client.get("/dashboard/login").headers["location"] == "/dashboard/"
        assert "in sync" in visitor.preview()


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/v1/status", "/metrics", "/openapi.json", "/dashboard/static/x"]
)
def test_without_a_token_only_loopback_names_are_answered(open_to_all: Site, path: str) -> None:
    with open_to_all.visitor() as visitor:
        assert visitor.client.get(path, headers={"host": "rebound.evil.example:8890"}).status_code == 421
        assert visitor.client.get(path, headers={"host": "localhost:8890"}).status_code != 421


def test_probes_are_answered_under_any_name(open_to_all: Site) -> None:
    with open_to_all.visitor() as visitor:
        for path in ("/healthz", "/readyz"):
            assert visitor.client.get(path, headers={"host": "10.1.2.3"}).status_code == 200


def test_with_a_token_any_name_is_answered(there: Site) -> None:
    with there.api(host="syncd.internal") as client:
        assert client.get("/v1/status").status_code == 200


def test_the_api_does_nothing_for_a_page_of_another_origin_either(open_to_all: Site) -> None:
    with open_to_all.visitor() as visitor:
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "same-site"}):
            answer = visitor.client.post("/v1/syncs", headers=headers)
            assert answer.status_code == 403
            assert "another origin" in answer.json()["detail"]
        assert visitor.client.post("/v1/syncs").status_code == 202
