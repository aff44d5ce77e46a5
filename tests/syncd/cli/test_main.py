"""The command line as real processes: exit statuses, stdout and stderr, and secrets."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from syncd import __version__
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project, command, environment
from tests.syncd.targets import subscribe
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow


def test_plan_apply_plan_goes_from_drift_to_in_sync(project: Project, sandbox: httpx.Client) -> None:
    first = project.run("plan")
    assert (first.returncode, first.stderr) == (2, "")
    assert "+ customer acme (" in first.stdout
    assert "guest" not in first.stdout
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 0

    applied = project.run("apply", "--yes")
    assert (applied.returncode, applied.stderr) == (0, "")
    assert "Applied: 5 done." in applied.stdout

    assert project.run("plan").returncode == 0
    again = project.call("apply", "--yes")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_plan_as_json_is_nothing_but_json(project: Project) -> None:
    result = project.call("plan", "-ojson")
    document = json.loads(result.stdout)
    assert result.returncode == 2
    assert not document["in_sync"]
    assert document["summary"]["create-customer"] == 2


def test_apply_as_json_contains_the_plan_and_each_outcome(project: Project) -> None:
    document = json.loads(project.call("apply", "--yes", "-ojson").stdout)
    assert document["summary"] == {"done": 5, "unchanged": 0, "blocked": 0, "skipped": 0}
    assert len(document["plan"]["changes"]) == len(document["outcomes"]) == 5


def test_apply_ends_with_3_when_something_is_blocked_and_does_the_rest(
    project: Project, sandbox: httpx.Client
) -> None:
    taken = {"key": "other", "name": "by hand", "usageAttribution": {"subjectKeys": ["acme"]}}
    sandbox.post("/api/v1/customers", json=taken).raise_for_status()
    assert project.call("plan").returncode == 2
    result = project.run("apply", "--yes")
    assert result.returncode == 3
    assert "its key 'acme' is a subject of customer" in result.stdout
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 2
    assert project.call("plan").returncode == 2


@pytest.mark.parametrize("decision", ["made by hand", "subscribed"])
def test_what_a_decision_of_people_blocks_is_shown_but_is_no_drift(
    project: Project, sandbox: httpx.Client, decision: str
) -> None:
    """Else one such customer would keep every run, exit status and alert at "blocked" for good."""
    if decision == "made by hand":
        sandbox.post("/api/v1/customers", json={"key": "acme", "name": "by hand"}).raise_for_status()
    else:
        kong = project.folder / "kong.yml"
        everybody = kong.read_text()
        kong.write_text(everybody.replace('- {username: bob, tags: ["customer:acme"]}\n', ""))
        assert project.call("apply", "--yes").returncode == 0
        subscribe(sandbox, "acme")
        kong.write_text(everybody)
    result = project.call("apply", "--yes")
    assert result.returncode == 0
    assert "blocked" in result.stdout
    assert project.call("plan").returncode == 0


def test_customers_made_by_hand_count_as_in_sync(project: Project, sandbox: httpx.Client) -> None:
    subjects = [
        change["subject_keys"] for change in json.loads(project.call("plan", "-ojson").stdout)["changes"]
    ]
    keys = sorted({key for keys in subjects for key in keys})
    by_hand = {"key": "finance", "name": "x", "usageAttribution": {"subjectKeys": keys}}
    sandbox.post("/api/v1/customers", json=by_hand).raise_for_status()
    result = project.call("plan")
    assert result.returncode == 0
    assert "Left alone:" in result.stdout


def test_a_source_that_cannot_be_read_ends_with_1_and_changes_nothing(
    project: Project, sandbox: httpx.Client
) -> None:
    project.configure()
    text = project.config.read_text().replace("}]", "}, {type: applications-file, path: gone.json}]", 1)
    project.config.write_text(text)
    for result in (project.call("plan"), project.run("apply", "--yes")):
        assert (result.returncode, result.stdout) == (1, "")
        assert "cannot read gone.json" in result.stderr
        assert "Traceback" not in result.stderr
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 0


def test_an_unreachable_metering_api_ends_with_1(project: Project) -> None:
    project.metering = "http://127.0.0.1:9"
    project.configure()
    result = project.call("plan")
    assert result.returncode == 1
    assert "metering API at http://127.0.0.1:9 did not answer" in result.stderr


def test_an_interrupted_apply_ends_with_1_and_reports_what_was_done(
    project: Project, sandbox: httpx.Client
) -> None:
    for method, path in (("POST", "/api/v1/subjects"), ("GET", "/api/v1/customers/kong-openmeter")):
        fault = {"method": method, "path": path, "action": "cut"}
        sandbox.post("/sandbox/v1/faults", json=fault).raise_for_status()
    result = project.run("apply", "--yes")
    assert result.returncode == 1
    assert "Applied: 2 done." in result.stdout
    assert "did not answer" in result.stderr
    document = json.loads(project.call("apply", "--yes", "-ojson").stdout)
    assert "did not answer" in document["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("destroy",),
        ("plan", "--force"),
        ("plan", "surplus"),
        ("sandbox",),
        ("sandbox", "--db", "x", "--port", "x"),
    ],
)
def test_wrong_usage_ends_with_64(project: Project, arguments: tuple[str, ...]) -> None:
    result = project.call(*arguments)
    assert result.returncode == 64
    assert "Usage: syncd" in result.stdout + result.stderr


def test_a_process_ends_with_64_after_wrong_usage(project: Project) -> None:
    assert project.run("plan", "--force").returncode == 64


def test_a_bad_configuration_ends_with_1_and_names_field_and_file(project: Project) -> None:
    project.configure("policy: mirror\n")
    result = project.call("plan")
    assert (result.returncode, result.stdout) == (1, "")
    assert "syncd.yaml" in result.stderr
    assert "policy" in result.stderr


def test_the_configuration_may_be_named_before_or_after_the_command_or_in_the_environment(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = str(project.config)
    project.folder = tmp_path_factory.mktemp("elsewhere")
    assert project.call("plan").returncode == 1
    assert project.call("--config", config, "plan").returncode == 2
    assert project.call("plan", "--config", config).returncode == 2
    assert project.run("plan", SYNCD_CONFIG=config).returncode == 2


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("words", [(), ("apply",), ("meters", "apply"), ("audit",)])
def test_help_shows_no_value_for_a_flag(project: Project, words: tuple[str, ...], option: str) -> None:
    shown = project.call(*words, option)
    assert shown.returncode == 0
    assert "<bool>" not in shown.stdout
    assert "--config" in shown.stdout or words[:1] == ("meters",)


def test_the_version_is_printed(tmp_path: Path) -> None:
    result = subprocess.run(
        command("--version"), env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout) == (0, f"syncd {__version__}\n")


def test_a_token_is_never_printed(tmp_path: Path) -> None:
    with running_sandbox(token="right-t0ken") as url:
        project = Project(tmp_path, url)
        wrong = project.run("plan", SYNCD_METERING__TOKEN="wr0ng-t0ken")
        assert wrong.returncode == 1
        assert "metering.token" in wrong.stderr
        assert "wr0ng-t0ken" not in wrong.stdout + wrong.stderr
        right = project.run("plan", SYNCD_METERING__TOKEN="right-t0ken")
        assert right.returncode == 2
        assert "right-t0ken" not in right.stdout + right.stderr


def test_usage_shows_customers_and_unbilled_subjects(project: Project, sandbox: httpx.Client) -> None:
    project.call("apply", "--yes")
    alice = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"
    for number, (kind, subject, data) in enumerate(
        [
            ("kong.api_request", alice, {}),
            ("kong.api_request", "stranger", {}),
            ("kong.llm_request", alice, {"tokens": 1200}),
        ]
    ):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": kind, "subject": subject}
        headers = {"Content-Type": "application/cloudevents+json"}
        sandbox.post("/api/v1/events", json={**event, "data": data}, headers=headers).raise_for_status()
    document = json.loads(project.call("usage", "-ojson").stdout)
    acme = next(customer for customer in document["customers"] if customer["key"] == "acme")
    assert (acme["requests"], acme["tokens"]) == (1, 1200)
    assert document["unbilled"] == [{"key": "stranger", "name": None, "requests": 1, "tokens": 0}]
    assert document["totals"] == {"requests": 2, "tokens": 1200}
    for period, requests in (("2020-01-01", 2), ("2099-01-01", 0), ("2020-01-01T01:00:00+01:00", 2)):
        document = json.loads(project.call("usage", "-ojson", "--from", period).stdout)
        assert document["totals"]["requests"] == requests
    table = project.call("usage")
    assert table.returncode == 0
    assert "Usage of all time\n" in table.stdout
    assert next(row.split() for row in table.stdout.splitlines() if alice in row)[-2:] == ["1", "1,200"]
    assert project.call("usage", "--last", "month").stdout.splitlines()[-1] == "Unbilled subjects: 0."
    assert project.call("usage", "--from", "yesterday").returncode == 64


def test_resync_without_a_daemon_ends_with_1_and_suggests_starting_it(project: Project) -> None:
    project.configure("daemon: {listen: '127.0.0.1:9'}\n")
    result = project.call("resync")
    assert result.returncode == 1
    assert "Is `syncd run` running" in result.stderr


def test_the_sandbox_serves_until_sigterm(tmp_path: Path) -> None:
    arguments = (
        "sandbox",
        "--port",
        "0",
        "--db",
        str(tmp_path / "s.sqlite3"),
        "--no-subjects",
        "--token",
        "t",
    )
    with subprocess.Popen(
        command(*arguments), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            url = next(word for word in process.stderr.readline().split() if word.startswith("http://"))
            assert eventually(lambda: httpx.get(f"{url}/healthz").is_success)
            assert httpx.get(f"{url}/api/v1/customers").status_code == 401
            headers = {"Authorization": "Bearer t"}
            assert httpx.get(f"{url}/api/v1/subjects", headers=headers).status_code == 404
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_a_sandbox_in_memory_is_refused_at_start_instead_of_failing_each_request(tmp_path: Path) -> None:
    result = subprocess.run(
        command("sandbox", "--port", "0", "--db", ":memory:"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert "the database cannot be in memory; name a file" in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_sandbox_that_cannot_start_ends_with_1(tmp_path: Path, sandbox: httpx.Client) -> None:
    port = str(sandbox.base_url.port)
    result = subprocess.run(
        command("sandbox", "--port", port, "--db", str(tmp_path / "s.sqlite3")),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert "the sandbox cannot start" in result.stderr
