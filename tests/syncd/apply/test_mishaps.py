"""Faults in each request of a run in turn: the run ends or stops, and the next runs converge."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from syncd.apply.executor import apply_plan
from syncd.config.settings import Dialect
from syncd.core.errors import ApiError, ApplyStoppedError
from syncd.core.model import Principal
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.mapping.desired_state import desired_state
from syncd.metering.v1 import OpenMeterV1
from syncd.metering.v3 import OpenMeterV3
from syncd.planning.orphans import Grace
from syncd.planning.plan import PlanOptions, make_plan
from tests.syncd.builders import BY_TAG, OWNER, consumer
from tests.syncd.proxy import MISHAPS, Mishap, Proxy, proxying

pytestmark = pytest.mark.slow

START = datetime(2026, 1, 1, tzinfo=UTC)
BEFORE = [
    consumer("1", "alice", "customer:acme"),
    consumer("2", "bob", "customer:acme"),
    consumer("3", "old name", "customer:globex"),
    consumer("5", "gone"),
    consumer("6", "frank", "customer:globex"),
]
AFTER = [
    consumer("1", "alice", "customer:acme"),
    consumer("2", "bob", "customer:globex"),
    consumer("3", "carol", "customer:globex"),
    consumer("4", "dave"),
    consumer("6", "frank", "customer:acme"),
]


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[Proxy]:
    with proxying(server) as proxy:
        yield proxy


def sync(
    url: str,
    principals: list[Principal],
    day: int,
    dialect: Dialect = "openmeter-v1",
    *,
    attempts: int = 1,
    timeout: float = 5,
    concurrency: int = 1,
) -> int:
    """One run of policy sync with moves allowed; returns how many changes were planned."""
    is_v3 = dialect == "openmeter-v3"
    base = f"{url.rstrip('/')}/api/v3" if is_v3 else url
    endpoint = Endpoint("metering", base, "metering.token", "read and write", timeout=timeout)
    retry = Retry(attempts=attempts, sleep=lambda _: None)
    target = OpenMeterV3(endpoint, retry) if is_v3 else OpenMeterV1(endpoint, retry)
    grace = Grace(START + timedelta(days=day), timedelta(days=40), timedelta(days=40))
    options = PlanOptions(allow_move=True, grace=grace)
    try:
        desired = desired_state(principals, BY_TAG)
        plan = make_plan(desired, target.observe(), owner_id=OWNER, policy="sync", options=options)
        apply_plan(plan, target, remover=target, concurrency=concurrency)
        return len(plan.actionable)
    finally:
        target.close()


def before(sandbox: httpx.Client) -> None:
    """Prepare a state in which the run of day 40 creates, moves, attaches, renames and deletes."""
    sandbox.post("/sandbox/v1/reset").raise_for_status()
    url = str(sandbox.base_url)
    sync(url, BEFORE, 0)
    sync(url, [one for one in BEFORE if one.username != "gone"], 0)


def customers(sandbox: httpx.Client) -> list[tuple[str, str, tuple[str, ...]]]:
    items = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    found = [(c["key"], c["name"], tuple(sorted(c["usageAttribution"]["subjectKeys"]))) for c in items]
    assert len({key for key, _, _ in found}) == len(found)
    return sorted(found)


WANTED = [
    ("acme", "acme", ("consumer:1", "consumer:6")),
    ("consumer:4", "dave", ("consumer:4",)),
    ("globex", "globex", ("consumer:2", "consumer:3")),
]


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_without_a_mishap_one_run_reaches_the_desired_state(
    sandbox: httpx.Client, proxy: Proxy, dialect: Dialect
) -> None:
    before(sandbox)
    assert sync(proxy.url, AFTER, 40, dialect) >= 6
    assert customers(sandbox) == WANTED
    assert sync(proxy.url, AFTER, 40, dialect) == 0


HOW: list[tuple[Dialect, int, int]] = [
    ("openmeter-v1", 1, 4),
    ("openmeter-v1", 3, 1),
    ("openmeter-v3", 1, 1),
]
# With concurrent requests, chance decides which are late together.
CASES = [(*how, mishap) for how in HOW for mishap in MISHAPS if (how[2], mishap) != (4, "delay")]


@pytest.mark.parametrize(("dialect", "attempts", "concurrency", "mishap"), CASES)
def test_later_runs_repair_a_mishap_with_any_request(
    sandbox: httpx.Client,
    proxy: Proxy,
    dialect: Dialect,
    attempts: int,
    concurrency: int,
    mishap: Mishap,
) -> None:
    before(sandbox)
    proxy.spoil(mishap, -1)
    sync(proxy.url, AFTER, 40, dialect, concurrency=concurrency)
    requests = proxy.seen
    # A delay takes as long as a timeout, so only every third request gets one.
    for number in range(0, requests, 3 if mishap == "delay" else 1):
        before(sandbox)
        proxy.spoil(mishap, number)
        try:
            timeout = 0.15 if mishap == "delay" else 5
            spoilt = {"attempts": attempts, "concurrency": concurrency}
            sync(proxy.url, AFTER, 40, dialect, timeout=timeout, **spoilt)
        except (ApiError, ApplyStoppedError):
            assert attempts == 1 or mishap == "repeat", f"request {number} was not retried"
        for _ in range(3):
            if sync(str(sandbox.base_url), AFTER, 40, dialect) == 0:
                break
        assert customers(sandbox) == WANTED, f"after {mishap} of request {number}"
