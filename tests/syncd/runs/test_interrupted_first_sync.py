"""An interrupted first sync continues by itself, against a server that creates subject entities.

OpenMeter creates a subject entity for each subject key when a customer is created
(openmeter/subject/service/hooks/customersubject.go).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from syncd.core.policy import Policy
from tests.syncd.daemon.test_service import daemon, idle
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

CONSUMERS = 30


@dataclass
class Provisioning:
    """Passes requests on to the sandbox and creates entities as OpenMeter does; `creations` are left."""

    sandbox: httpx.Client
    creations: int | None = None
    created: list[str] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Answer:
        if self.creations == 0:
            return Answer(cut=True)
        answer = self.sandbox.request(
            asked.method, asked.path, params=asked.query, json=asked.body if asked.body is not None else None
        )
        if asked.method == "POST" and asked.path == "/api/v1/customers":
            self._provision(answer.json())
        return Answer(answer.json() if answer.content else b"", answer.status_code)

    def _provision(self, customer: dict[str, object]) -> None:
        attribution = customer["usageAttribution"]
        assert isinstance(attribution, dict)
        there = {entity["key"] for entity in self.sandbox.get("/api/v1/subjects").json()}
        blank = {"createdBy": "subject.provisioner", "customerId": customer["id"]}
        entities = [{"key": k, "metadata": blank} for k in attribution["subjectKeys"] if k not in there]
        self.sandbox.post("/api/v1/subjects", json=entities).raise_for_status()
        self.created.append(str(customer["key"]))
        if self.creations is not None:
            self.creations -= 1


@pytest.fixture
def server_side(sandbox: httpx.Client) -> Provisioning:
    return Provisioning(sandbox)


@pytest.fixture
def first_sync(project: Project, server_side: Provisioning) -> Iterator[Project]:
    """A first sync of 30 consumers that was interrupted after 11 creations."""
    names = ", ".join(f"{{id: '{n}', username: user-{n}}}" for n in range(CONSUMERS))
    (project.folder / "kong.yml").write_text(f"_format_version: '3.0'\nconsumers: [{names}]\n")
    with serving(server_side) as server:
        project.metering, project.concurrency = server.url, 1
        server_side.creations = 11
        project.configure()
        assert project.call("apply", "--yes").returncode == 1
        assert len(server_side.created) == 11
        server_side.creations = None
        yield project


def display_names(sandbox: httpx.Client) -> set[object]:
    return {entity.get("displayName") for entity in sandbox.get("/api/v1/subjects").json()}


USERS = {f"user-{number}" for number in range(CONSUMERS)}


@pytest.mark.parametrize("policy", ["create-only", "upsert-only", "sync"])
def test_apply_completes_an_interrupted_first_sync_without_force(
    first_sync: Project, sandbox: httpx.Client, policy: Policy
) -> None:
    first_sync.settings += f"policy: {policy}\n"
    first_sync.configure()
    ended = first_sync.call("apply", "--yes")
    assert ended.returncode == 0, ended.stderr
    assert display_names(sandbox) == USERS
    assert first_sync.call("plan").returncode == 0


def test_the_daemon_completes_an_interrupted_first_sync_by_itself(
    first_sync: Project, sandbox: httpx.Client
) -> None:
    with daemon(first_sync) as client:
        last = idle(client)["last"]
    assert isinstance(last, dict)
    assert last["state"] == "succeeded", last["error"]
    assert display_names(sandbox) == USERS


def test_an_edited_entity_of_syncd_still_counts_as_an_update_of_its_customer(
    first_sync: Project, sandbox: httpx.Client
) -> None:
    assert first_sync.call("apply", "--yes").returncode == 0
    entities = sandbox.get("/api/v1/subjects").json()
    edited = [{"key": e["key"], "displayName": "old", "metadata": e["metadata"]} for e in entities]
    sandbox.post("/api/v1/subjects", json=edited).raise_for_status()
    ended = first_sync.call("apply", "--yes")
    assert ended.returncode == 1
    assert "too many updates: 30 of 30 customers" in ended.stderr
