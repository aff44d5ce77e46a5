"""A plan that people review, and its application to exactly that world."""

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
from tests.syncd.planning.test_properties import observed_worlds, principals
from tests.syncd.processes import KONG_YML, Project


def test_what_was_reviewed_is_applied(project: Project) -> None:
    assert project.call("plan", "--out", "plan.json").returncode == 2
    assert project.call("apply", "--plan", "plan.json").returncode == 0
    assert project.call("plan").returncode == 0


def test_a_plan_that_was_printed_as_json_can_be_applied_too(project: Project) -> None:
    (project.folder / "plan.json").write_text(project.call("plan", "--json").stdout)
    assert project.call("apply", "--plan", "plan.json").returncode == 0


def test_a_world_that_is_another_by_now_is_refused_and_told(project: Project, server: str) -> None:
    project.call("plan", "--out", "plan.json")
    (project.folder / "kong.yml").write_text(KONG_YML.replace("carol", "caroline"))
    refused = project.call("apply", "--plan", "plan.json")
    assert refused.returncode == 1
    assert "the world is not as it was" in refused.stderr
    assert "no longer: create-customer consumer-" in refused.stderr
    assert "new: create-customer consumer-" in refused.stderr
    assert httpx.get(f"{server}/api/v1/customers").json()["totalCount"] == 0


def test_the_flags_of_the_review_are_those_of_the_application(project: Project, server: str) -> None:
    httpx.post(f"{server}/api/v1/customers", json={"key": "acme", "name": "ACME Inc."}).raise_for_status()
    assert "adopt-customer  acme" in project.call("plan", "--adopt", "--out", "plan.json").stdout
    assert project.call("apply", "--plan", "plan.json").returncode == 0
    acme = httpx.get(f"{server}/api/v1/customers/acme").json()
    assert (acme["name"], acme["metadata"]["adopted"]) == ("ACME Inc.", "true")


def test_a_state_that_is_another_by_now_is_not_the_one_that_was_reviewed() -> None:
    """The change would be the same, but what it overwrites is not what people have seen."""

    def renaming(name: str) -> Plan:
        return plan_for(
            [consumer("1", "bob")], observed(customer("consumer:1", "consumer:1", name=name, owner=OWNER))
        )

    plan_file.require_same(renaming("alice"), renaming("alice"))
    with pytest.raises(PlanFileError, match="the world is not as it was"):
        plan_file.require_same(renaming("alice"), renaming("Alice GmbH"))


@pytest.mark.parametrize("flag", ["--allow-move", "--adopt", "--allow-empty", "--principal=alice"])
def test_a_flag_beside_a_reviewed_plan_is_wrong_usage_and_not_ignored(project: Project, flag: str) -> None:
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


def test_another_owner_or_policy_is_refused_in_words() -> None:
    with pytest.raises(PlanFileError, match="owner_id 'a'"):
        plan_file.require_same(Plan("a", "sync", ()), Plan("b", "sync", ()))


@given(principals, observed_worlds())
def test_a_plan_survives_being_written_and_read(wanted: list[Principal], world: ObservedState) -> None:
    plan = make_plan(desired_state(wanted, RULES), world, owner_id=OWNER, policy="sync")
    again = plan_file.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
