"""`syncd meters apply` over real HTTP, in both dialects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from syncd.config.settings import Dialect
from syncd.core.errors import ConfigError
from syncd.metering.base import MeteringApi
from syncd.metering.meters import AI_METERS, STANDARD_METERS, apply_meters, plan_meters, unit_meter
from tests.specs import checked
from tests.syncd.metering.test_contract import specs_of
from tests.syncd.processes import Project
from tests.syncd.targets import fault, open_target

pytestmark = pytest.mark.slow

KEYS = [meter.key for meter in STANDARD_METERS]


@pytest.fixture
def api(sandbox: httpx.Client, dialect: Dialect) -> Iterator[MeteringApi]:
    with closing(open_target(dialect, str(sandbox.base_url))) as target:
        checked(target._client, specs_of(dialect))
        yield target


def without_meters(sandbox: httpx.Client) -> None:
    for key in KEYS:
        sandbox.delete(f"/api/v1/meters/{key}").raise_for_status()


def statuses(api: MeteringApi) -> list[str]:
    return [result.status for result in apply_meters(api)]


def test_missing_meters_are_created_and_then_present(api: MeteringApi, sandbox: httpx.Client) -> None:
    without_meters(sandbox)
    assert statuses(api) == ["created"] * 3
    assert statuses(api) == ["present"] * 3
    assert [api.meters()[key] for key in KEYS] == list(STANDARD_METERS)


def test_the_sandbox_starts_with_the_standard_meters(api: MeteringApi) -> None:
    assert statuses(api) == ["present"] * 3


def test_a_meter_that_differs_is_reported_and_left_alone(api: MeteringApi, sandbox: httpx.Client) -> None:
    without_meters(sandbox)
    made = {
        "slug": "kong_llm_tokens",
        "aggregation": "MAX",
        "eventType": "other",
        "valueProperty": "$.n",
        "groupBy": {"model": "$.m", "extra": "$.extra"},
    }
    before = sandbox.post("/api/v1/meters", json=made).json()
    requests, tokens, _events = apply_meters(api)
    assert (requests.status, tokens.status) == ("created", "differs")
    assert tokens.differences[:3] == (
        "aggregation is 'max', not 'sum'",
        "event type is 'other', not 'kong.llm_request'",
        "value property is '$.n', not '$.tokens'",
    )
    assert "dimension model is '$.m', not '$.model'" in tokens.differences
    assert "dimension type is missing" in tokens.differences
    assert sandbox.get("/api/v1/meters/kong_llm_tokens").json() == before


def test_a_creation_whose_answer_was_lost_is_recognized(api: MeteringApi, sandbox: httpx.Client) -> None:
    without_meters(sandbox)
    fault(sandbox, method="POST", action="accept_then_cut", count=1)
    assert statuses(api) == ["created"] * 3


def test_the_meters_of_ai_traffic_are_created_with_their_dimensions(api: MeteringApi) -> None:
    wanted = [*AI_METERS, unit_meter("credits")]
    assert {result.status for result in plan_meters(api, wanted)} == {"missing"}
    assert {result.status for result in apply_meters(api, wanted)} == {"created"}
    assert {result.status for result in plan_meters(api, wanted)} == {"present"}
    there = api.meters()
    assert [there[meter.key] for meter in wanted] == wanted


@pytest.mark.parametrize("name", ["Credits", "a b", "a__b", "_a", "", "$.x"])
def test_a_unit_that_no_meter_key_can_hold_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--unit {name}: ")):
        unit_meter(name)


def test_the_plan_of_the_meters_ends_with_2_where_one_is_missing(
    tmp_path: Path, server: str, sandbox: httpx.Client
) -> None:
    project = Project(tmp_path, server)
    assert project.call("meters", "plan").returncode == 0
    result = project.call("meters", "plan", "--ai", "--unit", "credits")
    assert result.returncode == 2
    assert "kong_llm_cost: missing\n" in result.stdout
    assert result.stdout.endswith("kong_unit_credits: missing\n")
    assert project.call("meters", "apply", "--ai", "--unit", "credits").returncode == 0
    assert project.call("meters", "plan", "--ai", "--unit", "credits").returncode == 0


def test_the_command_ends_with_3_when_a_meter_differs(
    tmp_path: Path, server: str, sandbox: httpx.Client
) -> None:
    project = Project(tmp_path, server)
    assert project.call("meters", "apply").stdout == "".join(f"{key}: present\n" for key in KEYS)
    sandbox.delete("/api/v1/meters/kong_api_requests").raise_for_status()
    made = {"slug": "kong_api_requests", "aggregation": "COUNT", "eventType": "kong.api_request"}
    sandbox.post("/api/v1/meters", json=made).raise_for_status()
    result = project.call("meters", "apply", "--output=json")
    assert result.returncode == 3
    assert [meter["status"] for meter in json.loads(result.stdout)["meters"]] == [
        "differs",
        "present",
        "present",
    ]
