"""A metering API that answers one request with the document of another customer: nothing is written.

A cache with a wrong key, a lagging replica, or a proxy that answers twice on one connection does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest

from syncd.apply.executor import apply_plan
from syncd.config.settings import Dialect
from syncd.core.changes import ChangeKind, Plan
from syncd.core.errors import ApplyStoppedError, BlockedError, UnreliableApiError
from syncd.core.model import ObservedCustomer, Principal
from syncd.mapping.desired_state import desired_state
from syncd.metering.base import CustomerEdit, Meter, SubjectWrite
from syncd.planning.orphans import Grace
from syncd.planning.plan import PlanOptions, make_plan
from tests.syncd.builders import BY_TAG, OWNER, consumer
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import Target, by_hand, open_target, target_at, target_with

pytestmark = pytest.mark.slow

START = datetime(2026, 1, 1, tzinfo=UTC)
ACME, GLOBEX = consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:globex")
SINGLE, OTHER = consumer("3", "carol"), consumer("4", "dave")


@dataclass
class Confused:
    """Forwards to a metering API, but answers a read of one customer with the document of another."""

    upstream: str
    instead: dict[str, str] = field(default_factory=dict)
    """The id of a customer -> the id of the one whose document is returned."""
    written: list[str] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Answer:
        path = asked.path
        if asked.method == "GET":
            first, _, last = path.rpartition("/")
            path = f"{first}/{self.instead.get(last, last)}"
        else:
            self.written.append(f"{asked.method} {path}")
        query = f"?{urlencode(asked.query)}" if asked.query else ""
        answer = httpx.request(asked.method, f"{self.upstream}{path}{query}", json=asked.body)
        return Answer(answer.content, answer.status_code, {"Content-Type": "application/json"})


@contextmanager
def confused(sandbox: httpx.Client, dialect: Dialect) -> Iterator[tuple[Confused, Target]]:
    proxy = Confused(str(sandbox.base_url).rstrip("/"))
    with serving(proxy) as server, closing(open_target(dialect, server.url)) as target:
        yield proxy, target


def planned(
    target: Target, principals: Sequence[Principal], *, day: int = 0, adopt: bool = False, sync: bool = False
) -> Plan:
    grace = Grace(START + timedelta(days=day), timedelta(days=40), timedelta(days=40))
    return make_plan(
        desired_state(principals, BY_TAG),
        target.observe(),
        owner_id=OWNER,
        policy="sync" if sync else "upsert-only",
        options=PlanOptions(adopt=adopt, grace=grace),
    )


def documents(sandbox: httpx.Client) -> dict[str, dict[str, object]]:
    items = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    return {customer["key"]: customer for customer in items}


def rename(target: Target, sandbox: httpx.Client) -> Plan:
    apply_plan(planned(target, [SINGLE, OTHER]), target)
    return planned(target, [consumer("3", "caroline"), OTHER])


def add_subject(target: Target, sandbox: httpx.Client) -> Plan:
    apply_plan(planned(target, [ACME, GLOBEX]), target)
    return planned(target, [ACME, GLOBEX, consumer("5", "eve", "customer:acme")])


def mark_orphan(target: Target, sandbox: httpx.Client) -> Plan:
    apply_plan(planned(target, [SINGLE, OTHER]), target)
    return planned(target, [OTHER], sync=True)


def adopt(target: Target, sandbox: httpx.Client) -> Plan:
    for principal in (SINGLE, OTHER):
        by_hand(sandbox, key=f"consumer:{principal.id}", name=principal.username)
    return planned(target, [SINGLE, OTHER], adopt=True)


def delete(target: Target, sandbox: httpx.Client) -> Plan:
    apply_plan(planned(target, [SINGLE, OTHER]), target)
    for day in (0, 41, 82):
        plan = planned(target, [OTHER], day=day, sync=True)
        if any(change.kind is ChangeKind.DELETE_CUSTOMER for change in plan.changes):
            return plan
        apply_plan(plan, target, remover=target)
    raise AssertionError("no deletion was planned")


CASES = {
    ChangeKind.RENAME_CUSTOMER: (rename, "consumer:3", "consumer:4"),
    ChangeKind.ATTACH_SUBJECTS: (add_subject, "acme", "globex"),
    ChangeKind.MARK_ORPHANED: (mark_orphan, "consumer:3", "consumer:4"),
    ChangeKind.ADOPT_CUSTOMER: (adopt, "consumer:3", "consumer:4"),
    ChangeKind.DELETE_CUSTOMER: (delete, "consumer:3", "consumer:4"),
}


@pytest.mark.parametrize("kind", CASES)
def test_no_change_is_written_onto_a_customer_that_was_returned_instead_of_another(
    sandbox: httpx.Client, dialect: Dialect, kind: ChangeKind
) -> None:
    prepare, victim, other = CASES[kind]
    with closing(open_target(dialect, str(sandbox.base_url))) as direct:
        plan = prepare(direct, sandbox)
    assert kind in {change.kind for change in plan.changes}
    before = documents(sandbox)
    with confused(sandbox, dialect) as (proxy, target):
        proxy.instead = {str(before[victim]["id"]): str(before[other]["id"])}
        changes = (change for change in plan.changes if change.kind is kind and change.customer_key == victim)
        only = replace(plan, changes=tuple(changes))
        with pytest.raises(ApplyStoppedError, match="unreliable") as caught:
            apply_plan(only, target, remover=target)
    assert isinstance(caught.value.__cause__, UnreliableApiError)
    assert proxy.written == []
    assert documents(sandbox) == before
    with closing(open_target(dialect, str(sandbox.base_url))) as direct:
        # With right answers the same plan is carried out.
        outcomes = apply_plan(only, direct, remover=direct)
    assert [str(outcome.status) for outcome in outcomes] == ["done"]


def test_the_command_stops_with_the_reason(tmp_path: Path, sandbox: httpx.Client, dialect: Dialect) -> None:
    proxy = Confused(str(sandbox.base_url).rstrip("/"))
    with serving(proxy) as server:
        project = Project(tmp_path, server.url)
        project.config.write_text(
            f"{project.settings}metering: {{dialect: {dialect}, url: '{server.url}', concurrency: 1}}\n"
        )
        kong = project.folder / "kong.yml"
        users = ["{id: '3', username: carol}", "{id: '4', username: dave}"]
        kong.write_text(f'_format_version: "3.0"\nconsumers: [{", ".join(users)}]\n')
        assert project.call("apply", "--yes").returncode == 0
        there = documents(sandbox)
        kong.write_text(kong.read_text().replace("carol", "caroline"))
        ids = [str(document["id"]) for document in there.values()]
        proxy.instead = dict(zip(ids, reversed(ids), strict=True))
        proxy.written.clear()
        result = project.call("apply", "--yes")
    assert result.returncode == 1
    assert "the metering API is unreliable" in result.stderr
    assert not [written for written in proxy.written if "/customers" in written]
    assert documents(sandbox) == there


# Single reads, scripted

WRONG: dict[str, object] = {
    "id": "G",
    "key": "globex",
    "name": "Globex",
    "customer_id": "G",
    "customerId": "G",
}


def listed(*documents: dict[str, object]) -> Answer:
    page = {"page": {"number": 1, "size": 1000, "total": len(documents)}}
    return Answer({"items": documents, "totalCount": len(documents), "data": documents, "meta": page})


def wrong(asked: Asked) -> Answer:
    """Answer every request with what belongs to globex."""
    last = asked.path.rpartition("/")[2]
    if asked.method == "GET" and last in ("customers", "subscriptions", "meters"):
        return listed(WRONG)
    if last == "query":
        row = {"subject": "s", "value": 1, "customerId": "G", "dimensions": {"customer_id": "G"}}
        return Answer({"data": [row]})
    return Answer({**WRONG, "slug": "globex"})


def renamed(_there: ObservedCustomer) -> CustomerEdit:
    return CustomerEdit(name="new")


METER = Meter("acme", "acme", "", "count", "t")
READS: dict[str, Callable[[Target], object]] = {
    "customer_by_key": lambda target: target.customer_by_key("acme"),
    "edit_customer": lambda target: target.edit_customer("A", renamed),
    "inspect": lambda target: target.inspect("A"),
    "create_customer": lambda target: target.create_customer("acme", "ACME", [], {}),
    "create_meter": lambda target: target.create_meter(METER),
    "customer_usage": lambda target: target.customer_usage("globex", ["A"], "2026-01-01T00:00:00Z", None),
}


@pytest.mark.parametrize("read", READS)
def test_an_answer_about_something_else_than_was_asked_for_is_an_error(dialect: Dialect, read: str) -> None:
    with (
        serving(wrong) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(UnreliableApiError),
    ):
        READS[read](target)
    assert "PUT" not in {asked.method for asked in server.asked}


@pytest.mark.parametrize("read", ["edit_customer", "inspect"])
def test_a_deleted_customer_that_was_not_asked_for_says_nothing_about_the_one_that_was(
    dialect: Dialect, read: str
) -> None:
    gone = {**WRONG, "deletedAt": "2026-01-01T00:00:00Z", "deleted_at": "2026-01-01T00:00:00Z"}
    with (
        serving(lambda _asked: Answer(gone)) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(UnreliableApiError),
    ):
        READS[read](target)


def test_a_written_customer_that_comes_back_as_another_is_an_error(dialect: Dialect) -> None:
    acme = {"id": "A", "key": "acme", "name": "ACME"}

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/subscriptions"):
            return listed()
        return Answer(acme if asked.method == "GET" else WRONG)

    with (
        serving(answer) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(UnreliableApiError),
    ):
        target.edit_customer("A", renamed)


def test_the_subscriptions_of_another_customer_are_not_taken_for_those_of_one_to_be_deleted(
    dialect: Dialect,
) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/subscriptions"):
            return listed({"id": "S", "status": "inactive", "customerId": "G", "customer_id": "G"})
        if asked.path.endswith("/A"):
            return Answer({"id": "A", "key": "acme", "name": "ACME"})
        return Answer({}, 404)

    with (
        serving(answer) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(UnreliableApiError),
    ):
        target.inspect("A")


def test_written_subjects_that_come_back_as_others_are_an_error() -> None:
    with serving(lambda _asked: Answer([{"key": "bob"}])) as server, closing(target_at(server.url)) as target:
        target.write_subjects([SubjectWrite("bob", None, {})])
        with pytest.raises(UnreliableApiError, match="'bob'"):
            target.write_subjects([SubjectWrite("alice", None, {})])


@pytest.mark.parametrize("what", ["customers", "meters", "subjects"])
def test_a_list_that_names_one_entity_twice_with_different_content_is_an_error(
    dialect: Dialect, what: str
) -> None:
    if (dialect, what) == ("openmeter-v3", "subjects"):
        pytest.skip("this dialect has no subject entities")
    twice: list[dict[str, object]] = [
        {"id": "A", "key": "acme", "slug": "acme", "name": name} for name in ("ACME", "Globex")
    ]

    def answer(asked: Asked) -> Answer:
        if asked.path in (f"/api/v1/{what}", f"/openmeter/{what}"):
            is_plain = asked.path.endswith(("v1/meters", "v1/subjects"))
            return Answer(twice) if is_plain else listed(*twice)
        return Answer({}, 404) if asked.path.endswith("/v1/subjects") else listed()

    with (
        serving(answer) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(UnreliableApiError, match="twice"),
    ):
        target.meters() if what == "meters" else target.observe()


# Keys in paths


@pytest.mark.parametrize("key", [".", "..", "../customers/C", "a/../../customers/C", "a\\..\\b", "a/.", ""])
def test_a_key_that_libraries_fold_in_a_path_is_refused_by_name_before_any_request(key: str) -> None:
    with serving(lambda _asked: Answer({}, 404)) as server, closing(target_at(server.url)) as target:
        for act in (lambda key: target.delete_subject(key, lambda _there: None), target.customer_by_key):
            with pytest.raises(BlockedError, match="address of a request") as caught:
                act(key)
            assert repr(key) in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize("key", ["...", ".a", "a..b", "team/one", "%2e%2e", "a.", "日本/ä ?#"])
def test_any_other_key_reaches_its_own_entity(sandbox: httpx.Client, key: str) -> None:
    with closing(target_at(str(sandbox.base_url))) as target:
        target.create_customer(key, "x", [], {})
        target.write_subjects([SubjectWrite(key, None, {})])
        found = target.customer_by_key(key)
        assert found is not None
        assert found.key == key
        assert target.delete_subject(key, lambda _there: None)
        assert target.subjects() == ()
