"""What runs keep in the directory, from real sources and a real metering API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from syncd.config import settings
from syncd.core.errors import SyncdError
from syncd.customers.directory import Directory
from syncd.runs.history import DirectoryRecorder
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import new_run
from syncd.state.database import State
from tests.syncd.dashboard.support import consumers
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send
from tests.syncd.targets import by_hand, subscribe

pytestmark = pytest.mark.slow


@contextmanager
def directory(project: Project) -> Iterator[Directory]:
    with State(settings.load(project.config).daemon.state) as state:
        yield Directory(state)


NORMAL, PREVIEW = RunOptions(), RunOptions(dry_run=True)


def reconcile(project: Project, kept: Directory, options: RunOptions = NORMAL) -> None:
    observers = (DirectoryRecorder(kept),)
    Reconciler(settings.load(project.config), observers=observers).reconcile(new_run("manual", options))


@pytest.fixture
def kept(project: Project) -> Iterator[Directory]:
    project.configure("daemon: {state_dir: state}\n")
    with directory(project) as found:
        yield found


def subjects(sandbox: httpx.Client, key: str) -> list[str]:
    found: list[str] = sandbox.get(f"/api/v1/customers/{key}").json()["usageAttribution"]["subjectKeys"]
    return found


def test_customers_are_known_after_the_run_that_creates_them(
    project: Project, sandbox: httpx.Client, kept: Directory
) -> None:
    reconcile(project, kept)
    acme = kept.customer("acme")
    assert acme is not None
    assert sorted(acme.subject_keys) == sorted(subjects(sandbox, "acme"))
    assert kept.search("alice") == kept.search("customer:acme") == {acme.id}, "by username and by tag"
    assert acme.is_unseen
    reconcile(project, kept)
    seen = kept.customer("acme")
    assert seen is not None
    assert seen.id == sandbox.get("/api/v1/customers/acme").json()["id"]


def test_the_directory_equals_what_the_metering_api_has_after_each_run(
    project: Project, sandbox: httpx.Client, kept: Directory
) -> None:
    """What a run makes of the directory is what the next one would observe."""
    by_hand(sandbox, name="By hand", key="hand")
    reconcile(project, kept)
    consumers(
        project, "alice", "bob", "carol", "dave", tags={"alice": "acme", "dave": "acme", "carol": "hand"}
    )
    for options in (NORMAL, RunOptions(allow_move=True, adopt=True), NORMAL):
        reconcile(project, kept, options)
        listed = sandbox.get("/api/v1/customers").json()["items"]
        known = {(one.key, one.name, frozenset(one.subject_keys)) for one in kept.customers()}
        there = {
            (one["key"], one["name"], frozenset((one.get("usageAttribution") or {}).get("subjectKeys", ())))
            for one in listed
        }
        assert known == there


def test_a_blocked_subject_stands_against_its_customer_with_its_unbilled_usage(
    project: Project, sandbox: httpx.Client, kept: Directory
) -> None:
    reconcile(project, kept)
    subscribe(sandbox, "acme")
    consumers(project, "alice", "bob", "late", tags=dict.fromkeys(("alice", "bob", "late"), "acme"))
    reconcile(project, kept, PREVIEW)
    (concern,) = kept.concerns("acme")
    send(sandbox, event("1", subject=concern.subject), event("2", subject=concern.subject))
    reconcile(project, kept)
    (concern,) = kept.concerns("acme")
    assert (concern.blocked, concern.events) == (True, 2)
    assert "subscription" in concern.reason
    assert kept.names([concern.subject])[concern.subject][0].username == "late"


def test_a_preview_of_moves_does_not_hide_what_is_blocked_now(
    project: Project, sandbox: httpx.Client, kept: Directory
) -> None:
    reconcile(project, kept)
    consumers(project, "alice", "bob", "carol", tags={"alice": "acme", "bob": "other"})
    reconcile(project, kept)
    assert [one.blocked for one in kept.concerns("other")] == [True]
    reconcile(project, kept, RunOptions(dry_run=True, allow_move=True))
    assert [one.blocked for one in kept.concerns("other")] == [True]


def test_a_run_whose_source_fails_leaves_the_directory_alone(project: Project, kept: Directory) -> None:
    reconcile(project, kept)
    before = kept.edition()
    (project.folder / "kong.yml").write_text("nonsense: [")
    with pytest.raises(SyncdError):
        reconcile(project, kept)
    assert kept.edition() == before
    assert kept.customer("acme") is not None
