"""Plan files: reviewed plans, applied only while a fresh plan is the same."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given

from syncd.core.changes import Plan
from syncd.core.errors import PlanFileError
from syncd.core.model import ObservedState, Principal
from syncd.mapping.desired_state import desired_state
from syncd.planning import plan_file
from syncd.planning.plan import make_plan
from tests.syncd.builders import OWNER, RULES, consumer, customer, observed, plan_for
from tests.syncd.planning.test_properties import observed_states, principals
from tests.syncd.processes import KONG_YML, Project

pytestmark = pytest.mark.slow


def test_a_reviewed_plan_is_applied(project: Project) -> None:
    assert project.call("plan", "--out", "plan.json").returncode == 2
    assert project.call("apply", "--plan", "plan.json").returncode == 0
    assert project.call("plan").returncode == 0


def test_a_plan_that_was_printed_as_json_can_be_applied_too(project: Project) -> None:
    (project.folder / "plan.json").write_text(project.call("plan", "--output=json").stdout)
    assert project.call("apply", "--plan", "plan.json").returncode == 0


def test_an_outdated_plan_is_refused_with_the_differences(project: Project, server: str) -> None:
    project.call("plan", "--out", "plan.json")
    (project.folder / "kong.yml").write_text(KONG_YML.replace("carol", "caroline"))
    refused = project.call("apply", "--plan", "plan.json")
    assert refused.returncode == 1
    assert "the plan is out of date" in refused.stderr
    assert "no longer: create-customer consumer-" in refused.stderr
    assert "new: create-customer consumer-" in refused.stderr
    assert httpx.get(f"{server}/api/v1/customers").json()["totalCount"] == 0


def test_a_reviewed_plan_is_applied_with_its_own_flags(project: Project, server: str) -> None:
    httpx.post(f"{server}/api/v1/customers", json={"key": "acme", "name": "ACME Inc."}).raise_for_status()
    assert "~ customer acme: adopt it" in project.call("plan", "--adopt", "--out", "plan.json").stdout
    assert project.call("apply", "--plan", "plan.json").returncode == 0
    acme = httpx.get(f"{server}/api/v1/customers/acme").json()
    assert (acme["name"], acme["metadata"]["adopted"]) == ("ACME Inc.", "true")


def test_a_plan_that_would_overwrite_another_state_is_not_the_reviewed_one() -> None:
    """The change would be the same, but it would overwrite a state that was not reviewed."""

    def renaming(name: str) -> Plan:
        return plan_for(
            [consumer("1", "bob")], observed(customer("consumer:1", "consumer:1", name=name, owner=OWNER))
        )

    plan_file.require_same(renaming("alice"), renaming("alice"))
    with pytest.raises(PlanFileError, match="the plan is out of date"):
        plan_file.require_same(renaming("alice"), renaming("Alice GmbH"))


@pytest.mark.parametrize("flag", ["--allow-move", "--adopt", "--allow-empty", "--principal=alice"])
def test_a_flag_together_with_a_reviewed_plan_is_a_usage_error(project: Project, flag: str) -> None:
    project.call("plan", "--out", "plan.json")
    ended = project.call("apply", "--plan", "plan.json", flag)
    assert ended.returncode == 64
    assert "only --force" in ended.stderr
    assert project.call("plan").returncode == 2


@pytest.mark.parametrize("damage", ["not json", "[]", '{"version": 1}', None])
def test_a_file_that_is_no_plan_or_was_edited_is_refused(project: Project, damage: str | None) -> None:
    path = project.folder / "plan.json"
    project.call("plan", "--out", "plan.json")
    if damage is None:
        document = json.loads(path.read_text())
        document["changes"][0]["customer_key"] = "other"
        damage = json.dumps(document)
    path.write_text(damage)
    refused = project.call("apply", "--plan", "plan.json")
    assert refused.returncode == 1
    assert "plan.json" in refused.stderr


def test_the_checksum_is_about_what_changes_and_not_about_words_or_reports() -> None:
    one = plan_for([consumer("1", "alice")], observed())
    same = plan_for([consumer("1", "alice")], observed(customer("consumer:9", "x", owner=OWNER)))
    assert same.changes != one.changes
    assert same.checksum() == one.checksum() != plan_for([consumer("1", "bob")], observed()).checksum()


def test_another_owner_or_policy_is_refused_by_name() -> None:
    with pytest.raises(PlanFileError, match="owner_id 'a'"):
        plan_file.require_same(Plan("a", "sync", ()), Plan("b", "sync", ()))


@given(principals, observed_states())
def test_a_plan_survives_being_written_and_read(wanted: list[Principal], state: ObservedState) -> None:
    plan = make_plan(desired_state(wanted, RULES), state, owner_id=OWNER, policy="sync")
    again = plan_file.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
