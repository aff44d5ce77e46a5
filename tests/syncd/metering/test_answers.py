"""Both dialects on answers that the sandbox never gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from syncd.config.settings import Dialect
from syncd.core.errors import BlockedError, MalformedError, RefusedError, UnreachableError
from syncd.core.model import ObservedCustomer, ObservedSubject
from syncd.metering.base import CustomerEdit
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import open_target, target_with

DELETED = {"deletedAt": "2026-01-01T00:00:00Z", "deleted_at": "2026-01-01T00:00:00Z"}
THERE = {"id": "C", "key": "acme", "name": "ACME"}
PAGE = {"data": [], "meta": {"page": {"number": 1, "size": 1000, "total": 0}}}


def renamed(_there: ObservedCustomer) -> CustomerEdit:
    return CustomerEdit(name="other")


def test_a_deleted_customer_that_the_server_still_returns_is_not_written(dialect: Dialect) -> None:
    there = {**THERE, **DELETED}

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/customers"):
            return Answer({"data": [there], "meta": {"page": {"number": 1, "size": 1000, "total": 1}}})
        return Answer(PAGE if asked.path.endswith("/subscriptions") else there)

    with serving(answer) as server, closing(open_target(dialect, server.url)) as target:
        with pytest.raises(BlockedError, match="was deleted"):
            target.edit_customer("C", renamed)
        assert target.customer_by_key("acme") is None
    assert {asked.method for asked in server.asked} == {"GET"}


def test_reading_a_customer_is_tried_exactly_as_often_as_configured(dialect: Dialect) -> None:
    with (
        serving(lambda _asked: Answer({}, 503)) as server,
        closing(open_target(dialect, server.url)) as target,
        pytest.raises(UnreachableError),
    ):
        target.edit_customer("C", renamed)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 409])
def test_a_refused_deletion_is_an_error(dialect: Dialect, status: int) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.method == "DELETE":
            return Answer({"detail": "has a subscription"}, status)
        return Answer(PAGE if asked.path.endswith("/subscriptions") else THERE)

    with (
        serving(answer) as server,
        closing(open_target(dialect, server.url)) as target,
        pytest.raises(RefusedError, match="has a subscription"),
    ):
        target.delete_customer("C", lambda _there: None)


def test_a_deletion_that_failed_is_repeated_only_after_another_look_at_the_customer(dialect: Dialect) -> None:
    """A person may have renamed, sold or taken over the customer between two tries."""
    asked: list[str] = []

    def answer(request: Asked) -> Answer:
        asked.append(request.method)
        if request.method == "DELETE":
            return Answer({}, 503)
        name = "taken over" if "DELETE" in asked else "ACME"
        return Answer(PAGE if request.path.endswith("/subscriptions") else {**THERE, "name": name})

    def check(there: ObservedCustomer) -> None:
        if there.name != "ACME":
            raise BlockedError(there.name)

    with (
        serving(answer) as server,
        closing(open_target(dialect, server.url)) as target,
        pytest.raises(BlockedError, match="taken over"),
    ):
        target.delete_customer("C", check)
    assert asked.count("DELETE") == 1


def test_a_subject_entity_is_deleted_only_after_a_look_at_it_each_time() -> None:
    entities: Iterator[object] = iter([{"key": "s", "metadata": {}}, {"key": "s", "metadata": {"crm": "7"}}])
    deletions: list[str] = []

    def answer(request: Asked) -> Answer:
        if request.method == "GET":
            return Answer(next(entities))
        deletions.append(request.path)
        return Answer({}, 503)

    def check(there: ObservedSubject) -> None:
        if there.metadata:
            raise BlockedError("a person's")

    with (
        serving(answer) as server,
        closing(open_target("openmeter-v1", server.url)) as target,
        pytest.raises(BlockedError, match="a person's"),
    ):
        target.delete_subject("s", check)
    assert deletions == ["/api/v1/subjects/s"]


ONE = {"page": {"total": 1}}
ATTRIBUTION: dict[Dialect, tuple[str, str, dict[str, object]]] = {
    "openmeter-v1": ("usageAttribution", "subjectKeys", {"type": "customer_usage_attribution.v1"}),
    "openmeter-v3": ("usage_attribution", "subject_keys", {}),
}


def test_an_edit_sends_the_usage_attribution_back_with_only_its_own_additions(dialect: Dialect) -> None:
    field, keys, others = ATTRIBUTION[dialect]
    there = {**THERE, field: {**others, keys: ["z", "a", "m"]}, "annotations": {"x": 1}}
    with (
        serving(lambda asked: Answer(PAGE if asked.path.endswith("/subscriptions") else there)) as server,
        closing(target_with(dialect, server.url)) as target,
    ):
        target.edit_customer("C", lambda c: CustomerEdit(subject_keys=(*c.subject_keys, "b")))
    last = server.asked[-1]
    assert (last.method, last.path.rpartition("/")[2]) == ("PUT", "C")
    assert isinstance(last.body, dict)
    assert last.body[field] == {**others, keys: ["z", "a", "m", "b"]}
    assert last.body.keys() <= {"key", "name", field}
    assert len(server.asked) == (2 if dialect == "openmeter-v1" else 3)


@pytest.mark.parametrize(
    "answer",
    [
        Answer([]),
        Answer(
            {
                "items": [{"name": "no id"}],
                "totalCount": 1,
                "data": [{"id": "C"}],
                "meta": ONE,
            }
        ),
        Answer({"totalCount": 1, "meta": ONE}),
        Answer({"items": [], "data": []}),
        Answer(b"<html>"),
    ],
    ids=["list", "no id or name", "no list", "no total", "no JSON"],
)
def test_an_answer_that_is_not_a_list_of_customers_is_an_error(dialect: Dialect, answer: Answer) -> None:
    def answered(asked: Asked) -> Answer:
        return Answer(PAGE) if asked.path.endswith("/subscriptions") else answer

    with (
        serving(answered) as server,
        closing(target_with(dialect, server.url)) as target,
        pytest.raises(MalformedError),
    ):
        target.observe()
