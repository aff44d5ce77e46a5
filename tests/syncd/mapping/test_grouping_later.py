"""Consumers get tags after each has a customer of its own: on the command line, in both dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.syncd.processes import Project

pytestmark = pytest.mark.slow

SETTINGS = """
sources: [{{type: declarative-file, path: kong.yml}}]
metering: {{dialect: {dialect}, url: "{url}", attempts: 1}}
mapping: {{group_by: tag, key: "{key}", create: {{email: "{{username}}@x.example"}}}}
policy: {policy}
"""
ALONE = "_format_version: '3.0'\nconsumers: [{id: a, username: alice}, {id: b, username: bob}]\n"
TAGGED = """
_format_version: "3.0"
consumers:
- {id: a, username: alice, tags: ["customer:acme"]}
- {id: b, username: bob, tags: ["customer:acme"]}
"""


def project(
    folder: Path, sandbox: httpx.Client, dialect: str, key: str, policy: str = "upsert-only"
) -> Project:
    """A project in which alice and bob, with a customer and usage each, were tagged afterwards."""
    made = Project(folder, str(sandbox.base_url))
    url = str(sandbox.base_url)
    made.config.write_text(SETTINGS.format(dialect=dialect, url=url, key=key, policy=policy))
    (folder / "kong.yml").write_text(ALONE)
    assert made.call("apply", "--yes").returncode == 0
    for number, subject in enumerate(["consumer:a", "consumer:a", "consumer:b"]):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": "kong.api_request"}
        headers = {"Content-Type": "application/cloudevents+json"}
        sent = sandbox.post("/api/v1/events", json={**event, "subject": subject, "data": {}}, headers=headers)
        sent.raise_for_status()
    (folder / "kong.yml").write_text(TAGGED)
    return made


def usage(project: Project) -> dict[str, Any]:
    """Return the requests of each customer by its key, and the unbilled ones as ''."""
    found = json.loads(project.call("usage", "-ojson").stdout)
    assert found["totals"]["requests"] == 3
    unbilled = sum(subject["requests"] for subject in found["unbilled"])
    return {customer["key"]: customer["requests"] for customer in found["customers"]} | {"": unbilled}


def plan(project: Project, *flags: str) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = json.loads(project.call("plan", "-ojson", *flags).stdout)["changes"]
    return changes


def test_with_default_keys_a_move_is_enough_and_can_be_reversed(
    tmp_path: Path, sandbox: httpx.Client, dialect: str
) -> None:
    there = project(tmp_path, sandbox, dialect, "{kind}-{id}")
    assert usage(there) == {"consumer-a": 2, "consumer-b": 1, "": 0}
    assert {change["kind"] for change in plan(there)} == {"blocked"}
    assert "--allow-move" in plan(there)[0]["reason"]
    moves = [change for change in plan(there, "--allow-move") if change["kind"] == "move-subjects"]
    assert [move["usage"]["events"] for move in moves] == [2, 1]
    assert there.call("apply", "--yes", "--allow-move").returncode == 0
    assert there.call("plan").returncode == 0
    assert usage(there) == {"acme": 3, "consumer-a": 0, "consumer-b": 0, "": 0}
    (tmp_path / "kong.yml").write_text(ALONE)
    assert there.call("apply", "--yes", "--allow-move").returncode == 0
    assert usage(there) == {"acme": 0, "consumer-a": 2, "consumer-b": 1, "": 0}


def test_with_the_subject_as_key_the_plan_says_what_to_do_by_hand_and_that_loses_no_usage(
    tmp_path: Path, sandbox: httpx.Client, dialect: str
) -> None:
    there = project(tmp_path, sandbox, dialect, "{subject}")
    blocked = plan(there, "--allow-move")
    assert [(change["kind"], change["subject_keys"]) for change in blocked] == [
        ("blocked", ["consumer:a"]),
        ("blocked", ["consumer:b"]),
    ]
    for change in blocked:
        (subject,) = change["subject_keys"]
        assert f"delete customer '{subject}'" in change["reason"]
        sandbox.delete(f"/api/v1/customers/{subject}").raise_for_status()
    assert there.call("apply", "--yes").returncode == 0
    assert there.call("plan").returncode == 0
    assert usage(there) == {"acme": 3, "": 0}


def test_a_plan_blocks_the_deletion_of_a_customer_with_an_entitlement(
    tmp_path: Path, sandbox: httpx.Client, dialect: str
) -> None:
    there = project(tmp_path, sandbox, dialect, "{kind}-{id}", "sync")
    there.config.write_text(
        there.config.read_text() + "policy_options: {detach_after: 1d, delete_after: 1d}\n"
    )
    (tmp_path / "kong.yml").write_text(
        ALONE.replace("id: a, username: alice", "id: c, username: carol").replace("id: b", "id: d")
    )
    for name in ("a", "b"):
        made = sandbox.get(f"/api/v1/customers/consumer-{name}").json()
        body = {name: made[name] for name in ("key", "name", "usageAttribution")}
        body["metadata"] = {**made["metadata"], "orphaned-at": "20260101T000000Z"}
        sandbox.put(f"/api/v1/customers/{made['id']}", json=body).raise_for_status()
    sandbox.post("/sandbox/v1/customers/consumer-a/entitlements").raise_for_status()
    kinds = {change["customer_key"]: change["kind"] for change in plan(there)}
    assert kinds["consumer-a"] == "blocked"
    assert kinds["consumer-b"] == "delete-customer"
    # It waits for what a person gave the customer, so the run is not a failed one.
    assert there.call("apply", "--yes").returncode == 0
    assert sandbox.get("/api/v1/customers/consumer-b").status_code == 404
