"""Preview and apply, and forged forms."""

from __future__ import annotations

import re

import httpx
import pytest

from syncd.dashboard.session import new_id
from tests.syncd.dashboard.support import TOKEN, Site, Visitor, consumers, form_token, site, text_of
from tests.syncd.processes import Project
from tests.syncd.targets import by_hand, fault

pytestmark = pytest.mark.slow


def names(sandbox: httpx.Client) -> set[str]:
    items = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    return {item["name"] for item in items}


def run_ids(visitor: Visitor) -> list[str]:
    return re.findall(r'href="/dashboard/runs/(\w+)"', visitor.see("/dashboard/runs"))


def test_a_resync_previews_and_then_applies_exactly_that(project: Project, sandbox: httpx.Client) -> None:
    with site(project) as found, found.operator() as visitor:
        consumers(project, "carol", "dave")
        shown = visitor.preview()
        assert "create-customer" in shown
        assert "+ added name dave" in text_of(shown)
        assert "dave" not in names(sandbox)
        done = visitor.apply(shown)
        assert "dave" in names(sandbox)
        assert re.search(r"create-customer \S+ done", text_of(done))
        assert "as reviewed" in text_of(done)
        assert "Is everything in sync? Yes" in text_of(visitor.see())
        assert "dashboard" in text_of(visitor.see("/dashboard/runs"))


def test_an_empty_plan_has_nothing_to_confirm(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        page = visitor.preview()
        assert "No changes." in page
        assert "Apply" not in text_of(page)


def test_a_plan_that_changed_since_the_preview_is_refused_with_the_differences(
    project: Project, sandbox: httpx.Client
) -> None:
    with site(project) as found, found.operator() as visitor:
        consumers(project, "carol", "dave")
        shown = visitor.preview()
        consumers(project, "carol", "dave", "eve")
        refused = text_of(visitor.apply(shown))
        assert "nothing was changed. Plan and review again" in refused
        assert "new: create-customer" in refused
        assert not {"dave", "eve"} & names(sandbox)
        with found.api() as client:
            assert client.get("/readyz").status_code == 200, "an outdated review is no fault of the daemon"
            assert 'syncd_run_failures_total{reason="review"} 1.0' in client.get("/metrics").text
        visitor.apply(visitor.preview())
        assert {"dave", "eve"} <= names(sandbox)


def test_a_confirmation_that_is_sent_twice_runs_once(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        consumers(project, "carol", "dave")
        shown = visitor.preview()
        first = visitor.confirm(shown).headers["location"]
        visitor.finished(visitor.confirm(shown))
        assert visitor.confirm(shown).headers["location"] == first
        assert len(run_ids(visitor)) == 3  # the first of the daemon, the dry run, and one real one


def test_a_preview_can_be_confirmed_after_a_restart(project: Project, sandbox: httpx.Client) -> None:
    with site(project) as found, found.operator() as visitor:
        consumers(project, "carol", "dave")
        shown = visitor.preview()
    fault(sandbox, method="POST", path="/api/v1/customers")
    with site(project) as found, found.operator() as visitor:
        # The run at start has failed, so the previewed changes are still to do.
        assert "dave" not in names(sandbox)
        sandbox.delete("/sandbox/v1/faults").raise_for_status()
        fresh = visitor.see(re.findall(r"(/dashboard/runs/\w+)/apply", shown)[0])
        visitor.apply(fresh)
        assert "dave" in names(sandbox)


def test_options_of_the_preview_are_those_of_the_real_run(project: Project, sandbox: httpx.Client) -> None:
    with site(project) as found, found.operator() as visitor:
        by_hand(sandbox, name="Dave by hand", key="group")
        consumers(project, "carol", "dave", tags={"dave": "group"})
        blocked = text_of(visitor.preview())
        assert "blocked group" in blocked
        assert "preview again with “Adopt existing customers whose key matches” under Options" in blocked
        shown = visitor.preview(adopt="on", principal="dave")
        assert "adopt-customer group" in text_of(shown)
        done = text_of(visitor.apply(shown))
        assert "adopt-customer group done" in done
        assert "adoptions allowed" in done
        assert "principal dave" in done


def test_the_options_that_an_advice_names_are_on_the_form(project: Project) -> None:
    from syncd.runs.options import TABLE, hint_for

    with site(project) as found, found.operator() as visitor:
        form = text_of(visitor.see())
    assert [
        entry.hint for entry in TABLE.values() if entry.hint and str(hint_for(entry.hint)) not in form
    ] == []


def test_an_unknown_principal_is_reported(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        page = text_of(visitor.preview(principal="nobody"))
    assert "no principal matches principal nobody" in page


def test_a_guard_must_be_overridden_explicitly(project: Project, sandbox: httpx.Client) -> None:
    extra = "guards: {min_changes: 1, max_update_percent: 1}\n"
    with site(project, extra=extra) as found, found.operator() as visitor:
        consumers(project, "alice", "bob", "eve", tags=dict.fromkeys(("alice", "bob", "eve"), "acme"))
        shown = visitor.preview()
        assert "A guard would stop this run: too many updates" in text_of(shown)
        assert re.search(r'name="force" required', shown)
        assert "too many updates" in text_of(visitor.apply(shown))
        acme = sandbox.get("/api/v1/customers/acme").json()
        assert len(acme["usageAttribution"]["subjectKeys"]) == 2
        assert "attach-subjects acme done" in text_of(visitor.apply(shown, force="on"))


def test_max_changes_cannot_be_overridden_here(project: Project) -> None:
    with site(project, extra="guards: {max_changes: 1}\n") as found, found.operator() as visitor:
        consumers(project, "dave", "eve", "frank")
        shown = visitor.preview()
        assert "A guard would stop this run: the plan has" in text_of(shown)
        assert "Apply 6 changes" not in text_of(shown)
        assert 'name="force"' not in shown


@pytest.mark.parametrize("which", ["real", "unknown"])
def test_only_a_dry_run_can_be_applied(project: Project, which: str) -> None:
    with site(project) as found, found.operator() as visitor:
        run = run_ids(visitor)[0] if which == "real" else "0" * 32
        answer = visitor.send(f"/dashboard/runs/{run}/apply")
        assert answer.status_code == 409
        assert "Preview again" in answer.text
        assert len(run_ids(visitor)) == 1


# Forged forms


def forged(found: Site, visitor: Visitor, path: str) -> list[httpx.Response]:
    """Requests that are almost a form of this visitor."""
    with found.operator() as other:
        of_another = other.form_token()
    mine = visitor.form_token()
    client = visitor.client

    def post(token: str | None, **headers: str) -> httpx.Response:
        return client.post(path, data={} if token is None else {"form_token": token}, headers=headers)

    return [
        post(None),
        post(""),
        post(of_another),
        post(mine[:-1]),
        post(mine, origin="https://evil.example"),
        post(mine, origin="null"),
        post(mine, **{"sec-fetch-site": "cross-site"}),
        post(mine, **{"sec-fetch-site": "same-site"}),
        post(mine, origin=found.url, **{"sec-fetch-site": "cross-site"}),
        client.post(path, json={"form_token": mine}),
        client.post(path, content=f"form_token={mine}", headers={"content-type": "text/plain"}),
        client.post(path, files={"form_token": (None, mine)}),
        client.get(path, params={"form_token": mine}),
    ]


@pytest.mark.parametrize("path", ["/dashboard/resync", "/dashboard/logout", "/dashboard/runs/{run}/apply"])
def test_a_forged_form_does_nothing(project: Project, sandbox: httpx.Client, path: str) -> None:
    with site(project) as found, found.operator() as visitor:
        consumers(project, "carol", "dave")
        shown = visitor.preview()
        run = re.findall(r"/dashboard/runs/(\w+)/apply", shown)[0]
        before = run_ids(visitor)
        answers = forged(found, visitor, path.format(run=run))
        assert [answer.status_code for answer in answers] == [400] + [403] * 8 + [400] * 3 + [405]
        assert run_ids(visitor) == before
        assert "dave" not in names(sandbox)
        visitor.apply(shown)
        assert "dave" in names(sandbox)


def test_without_a_token_a_forged_form_does_nothing_either(project: Project) -> None:
    with site(project, token=None) as found, found.visitor() as visitor:
        visitor.see()
        before = run_ids(visitor)
        planted = {"cookie": f"syncd-session={new_id()}"}
        answers = [
            visitor.client.post("/dashboard/resync"),
            visitor.client.post("/dashboard/resync", data={"form_token": "0" * 64}),
            visitor.client.post(
                "/dashboard/resync", data={"form_token": visitor.form_token()}, headers=planted
            ),
            visitor.client.post(
                "/dashboard/resync",
                data={"form_token": visitor.form_token()},
                headers={"origin": "http://127.0.0.1:1"},
            ),
        ]
        with found.visitor() as fresh:
            token = visitor.form_token()
            answers.append(fresh.client.post("/dashboard/resync", data={"form_token": token}))
        assert [answer.status_code for answer in answers] == [400] + [403] * 4
        assert run_ids(visitor) == before
        assert "in sync" in visitor.preview()


def test_a_form_of_a_session_that_ended_leads_to_the_login(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        token = visitor.form_token()
        visitor.send("/dashboard/logout")
        answer = visitor.client.post("/dashboard/resync", data={"form_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/login")
        assert len(found.running.config.sources) == 1


def test_the_bearer_token_of_the_api_sends_no_form(project: Project) -> None:
    with site(project) as found, found.visitor(authorization=f"Bearer {TOKEN}") as visitor:
        assert visitor.client.get("/dashboard/").status_code == 303
        token = form_token(visitor.see("/dashboard/login"))
        assert visitor.client.post("/dashboard/resync", data={"form_token": token}).status_code == 303


def test_the_cookie_of_the_dashboard_opens_no_api(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        assert visitor.client.get("/v1/status").status_code == 401
        assert visitor.client.post("/v1/syncs").status_code == 401


def test_a_form_too_large_is_refused(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        answer = visitor.send("/dashboard/resync", principal="x" * 20_000)
        assert answer.status_code == 400
        assert "16384 bytes" in answer.text
        answer = visitor.send("/dashboard/resync", **{f"field{number}": "" for number in range(40)})
        assert answer.status_code == 400
