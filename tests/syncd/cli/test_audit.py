"""Errors with which `syncd audit` refuses to start."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.syncd.audits import HOUR, hours_ago
from tests.syncd.processes import Project

GATEWAYS = "gateways: [{name: east, url: 'http://127.0.0.1:9', token: token-of-the-gateway}]\n"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, "http://127.0.0.1:9")
    project.configure(GATEWAYS)
    return project


def test_without_gateways_there_is_nothing_to_compare(project: Project) -> None:
    project.configure()
    result = project.call("audit")
    assert (result.returncode, result.stdout) == (1, "")
    assert "gateways: none is listed" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", "2026-11-22T07:00:00"),
        ("--from", "yesterday"),
        ("--to", "2026-13-01"),
        ("--wait",),
        ("--dry-run",),
        ("--force",),
        ("--settle", "-1"),
        ("--redeliver", "--wait", "--timeout", "-1"),
    ],
)
def test_a_usage_error_has_its_own_exit_status(project: Project, arguments: tuple[str, ...]) -> None:
    assert project.call("audit", *arguments).returncode == 64


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", (hours_ago(0) + HOUR / 60).isoformat()),
        ("--from", hours_ago(2).isoformat(), "--to", hours_ago(3).isoformat()),
        ("--from", hours_ago(2).isoformat(), "--to", hours_ago(2).isoformat()),
    ],
)
def test_a_span_without_a_complete_hour_is_an_error(project: Project, arguments: tuple[str, ...]) -> None:
    # The hour may change between the two clock readings; then there is one, but it cannot be read.
    result = project.call("audit", *arguments)
    assert result.returncode == 1
    assert datetime.now(UTC) >= hours_ago(0) + HOUR or "no complete hour" in result.stderr


@pytest.mark.parametrize("moment", ["2026-11-20", "2026-11-20T05:30:00Z", "2026-11-20T05:30:00+05:30"])
def test_a_time_or_a_day_is_accepted_and_an_unreachable_metering_api_is_named(
    project: Project, moment: str
) -> None:
    result = project.call("audit", "--from", moment, "--to", "2026-11-21")
    assert result.returncode == 1
    assert "metering API at http://127.0.0.1:9 did not answer" in result.stderr
    assert "token-of-the-gateway" not in result.stderr
