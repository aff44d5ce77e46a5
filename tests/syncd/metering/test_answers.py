"""Both dialects on answers that the sandbox never gives."""

from __future__ import annotations

from contextlib import closing

import pytest

from syncd.config.settings import Dialect
from syncd.core.errors import BlockedError, RefusedError, UnreachableError
from syncd.core.model import ObservedCustomer
from syncd.metering.base import CustomerEdit
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import open_target

DELETED = {"deletedAt": "2026-01-01T00:00:00Z", "deleted_at": "2026-01-01T00:00:00Z"}
PAGE = {"data": [], "meta": {"page": {"number": 1, "size": 1000, "total": 0}}}


def renamed(_there: ObservedCustomer) -> CustomerEdit:
    return CustomerEdit(name="other")


def test_a_deleted_customer_that_the_server_still_returns_is_not_written(dialect: Dialect) -> None:
    there = {"id": "C", "key": "acme", "name": "ACME", **DELETED}

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
    with (
        serving(lambda _asked: Answer({"detail": "has a subscription"}, status)) as server,
        closing(open_target(dialect, server.url)) as target,
        pytest.raises(RefusedError, match="has a subscription"),
    ):
        target.delete_customer("C")
