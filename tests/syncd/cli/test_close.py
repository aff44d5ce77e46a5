"""`syncd close`: exit statuses and outputs, against a sandbox and a gateway."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.syncd.close.worlds import ALICE, MONTH, World, world

pytestmark = pytest.mark.slow

NAME = str(MONTH)
SPAN = ("--from", f"{MONTH.since:%Y-%m-%d}", "--to", f"{MONTH.until:%Y-%m-%d}")


@pytest.fixture
def there(tmp_path: Path, sandbox: httpx.Client, request: pytest.FixtureRequest) -> Iterator[World]:
    dialect = getattr(request, "param", "openmeter-v1")
    with world(tmp_path / "world", sandbox, "eu", dialect=dialect) as found:
        found.serve(ALICE, 5)
        found.spend(ALICE, 120)
        yield found


def test_a_month_is_closed_once_and_stays_so(there: World) -> None:
    status, out, err = there.call(NAME, "--by", "mia")
    assert (status, err) == (0, "")
    assert f"{NAME} (UTC): 5 requests, 120 tokens, 1 customer with usage." in out
    assert "Audit: kong.api_request: 5 delivered, 0 refused, 5 counted by kong_api_requests." in out
    assert f"{NAME} has been closed since" in out
    status, again, _ = there.call(NAME)
    assert (status, again) == (0, out)


def test_what_stands_against_it_comes_with_its_cure(there: World) -> None:
    there.serve("stranger", 2)
    there.gateways["eu"].quarantined = 1
    status, out, _ = there.call(NAME)
    assert status == 2
    assert "! quarantine: eu has 1 request in quarantine, of the month or perhaps of it." in out
    assert "! unbilled: 1 subject without a customer: 2 requests, 0 tokens." in out
    assert "Give each subject a customer" in out
    assert f"{NAME} is not closed: 2 objections." in out
    assert "SHA-256" not in out
    assert there.call()[1] == "No month is closed.\n"


def test_accepting_needs_a_reason_and_a_name(there: World) -> None:
    there.serve("stranger", 2)
    assert there.call(NAME, "--accept", "unbilled")[0] == 64
    assert there.call(NAME, "--accept", "unbilled", "--reason", "trial")[0] == 64
    assert there.call(NAME, "--accept", "gateway", "--reason", "trial", "--by", "mia")[0] == 64
    assert there.call(NAME, "--accept", "everything", "--reason", "trial", "--by", "mia")[0] == 64
    status, out, _ = there.call(NAME, "--accept", "unbilled", "--reason", "trial", "--by", "mia")
    assert status == 0
    assert "- unbilled: 1 subject without a customer: 2 requests, 0 tokens. Accepted by mia: trial." in out


@pytest.mark.parametrize("arguments", [("2026-13",), ("october",), ("--again",), ("-o", "html")])
def test_a_wrong_month_is_a_usage_error(there: World, arguments: tuple[str, ...]) -> None:
    assert there.call(*arguments)[0] == 64


def test_a_dry_run_closes_nothing(there: World) -> None:
    status, out, _ = there.call(NAME, "--dry-run")
    assert (status, out.splitlines()[-2]) == (0, f"{NAME} can be closed.")
    assert there.call()[1] == "No month is closed.\n"


def test_late_events_are_listed_by_month_and_in_all(there: World) -> None:
    there.call(NAME)
    there.serve(ALICE, 1)
    status, out, _ = there.call(NAME)
    assert status == 2
    assert f"! {ALICE} (acme): +1 request" in out
    assert "the meters count differently now, for 1 subject" in out
    status, out, _ = there.call()
    assert status == 2
    assert f"! changed since: {ALICE} +1 request" in out
    (month,) = json.loads(there.call("-o", "json")[1])["months"]
    assert [(one["subject"], one["requests"]) for one in month["late"]] == [(ALICE, 1)]
    assert there.call(NAME, "--again")[0] == 0
    assert there.call()[0] == 0


def test_the_files_are_the_same_each_time_and_have_the_digest(there: World) -> None:
    first = {kind: there.call(NAME, "-o", kind)[1] for kind in ("json", "csv", "html")}
    there.serve(ALICE, 1)
    for kind, text in first.items():
        status, again, complaint = there.call(NAME, "-o", kind)
        assert (status, again) == (2, text), "a closed report stays as it was"
        assert "count differently now" in complaint
    digest = json.loads(first["json"])["sha256"]
    assert digest in first["csv"]
    assert digest in first["html"]
    content = json.loads(first["json"])["report"]
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(plain.encode()).hexdigest() == digest


@pytest.mark.parametrize("there", ["openmeter-v1", "openmeter-v3"], indirect=True)
def test_every_figure_equals_usage_audit_and_the_api_to_the_event(there: World) -> None:
    """Four subjects with usage at both edges of the month and outside, one of them unbilled."""
    for number, subject in enumerate((ALICE, "stranger", "healthcheck"), 3):
        there.serve(subject, number)
        there.serve(subject, number, MONTH.since)
        there.serve(subject, 1, MONTH.until)
        there.spend(subject, 10 * number)
    arguments = ("--accept", "unbilled", "--reason", "trial", "--by", "mia")
    status, report = there.report(NAME, *arguments)
    assert status == 0
    used = json.loads(there.project.call("usage", *SPAN, "-ojson").stdout)
    assert report["totals"] == used["totals"]
    assert report["unbilled"] == used["unbilled"]
    with_usage = [one for one in used["customers"] if one["requests"] or one["tokens"]]
    assert report["customers"] == [
        {**one, "subjects": [s for s in one["subjects"] if s["requests"] or s["tokens"]]}
        for one in with_usage
    ]
    audited = json.loads(there.project.call("audit", *SPAN, "-ojson", "--settle", "0").stdout)
    assert report["audit"]["types"] == audited["types"]
    (requests,) = (one for one in audited["types"] if one["type"] == "kong.api_request")
    assert requests["counted"] == report["totals"]["requests"] == 5 + 2 * (3 + 4 + 5)
    query = {"from": f"{MONTH.since:%Y-%m-%dT%H:%M:%SZ}", "to": f"{MONTH.until:%Y-%m-%dT%H:%M:%SZ}"}
    for meter, what in (("kong_api_requests", "requests"), ("kong_llm_tokens", "tokens")):
        answer = there.sandbox.get(f"/api/v1/meters/{meter}/query", params=query).json()
        assert sum(row["value"] for row in answer["data"]) == report["totals"][what]
    rows = list(csv.DictReader(io.StringIO(there.call(NAME, "-o", "csv")[1])))
    lines = [row for row in rows if row["section"] in ("customer", "unbilled")]
    assert sum(int(row["requests"]) for row in lines) == report["totals"]["requests"]
    assert sum(int(row["tokens"]) for row in lines) == report["totals"]["tokens"]


def test_a_metering_api_that_is_away_is_status_1(there: World) -> None:
    there.sandbox.post("/sandbox/v1/faults", json={"status": 503}).raise_for_status()
    status, out, err = there.call(NAME)
    assert (status, out) == (1, "")
    assert "metering API" in err


def test_two_commands_at_once_close_a_month_once(there: World) -> None:
    """As two machines with one cron table do."""
    import sys

    command = [sys.executable, "-m", "syncd", "close", NAME, "--settle", "0"]
    running = [
        subprocess.Popen(
            command,
            cwd=there.project.folder,
            env=there.project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [(*process.communicate(timeout=60), process.returncode) for process in running]
    assert {status for *_, status in results} <= {0, 1}
    assert any(status == 0 for *_, status in results)
    assert all("another syncd has closed" in err for _, err, status in results if status)
    (month,) = json.loads(there.call("-o", "json")[1])["months"]
    assert month["revision"] == 1
