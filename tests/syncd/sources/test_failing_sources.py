"""A daemon with policy sync whose Kong starts to fail: nothing is removed, and the daemon recovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.syncd.daemon.test_service import daemon, finished, idle
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

PAGES = 8


class Kong:
    """An Admin API with eight pages of two consumers; `fault` may answer instead."""

    def __init__(self, *, database: bool) -> None:
        self.database = database
        self.hash = "a" * 32
        self.fault: Callable[[Asked], Answer | None] = lambda _: None

    def __call__(self, asked: Asked) -> Answer:
        return self.fault(asked) or self._healthy(asked)

    def _healthy(self, asked: Asked) -> Answer:
        if asked.path == "/status":
            return Answer({} if self.database else {"configuration_hash": self.hash})
        if asked.path == "/plugins":
            return Answer({"data": [], "next": None})
        number = int(asked.query.get("offset", "0"))
        data = [{"id": f"{number}{name}", "username": f"{name}-{number}", "tags": None} for name in "ab"]
        following = str(number + 1) if number + 1 < PAGES else None
        link = f"/consumers?offset={following}" if following else None
        return Answer({"data": data, "offset": following, "next": link})

    def change(self) -> None:
        """Change the configuration, so that a daemon reads it again."""
        self.hash = "b" * 32 if self.hash[0] == "a" else "a" * 32


def on_page(number: int, answer: Answer) -> Callable[[Asked], Answer | None]:
    offset = None if number == 1 else str(number - 1)
    return lambda asked: (
        answer if asked.path == "/consumers" and asked.query.get("offset") == offset else None
    )


def at(path: str, answer: Answer) -> Callable[[Asked], Answer | None]:
    return lambda asked: answer if asked.path == path else None


def customers(sandbox: httpx.Client) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    return items


@contextmanager
def healthy_daemon(folder: Path, sandbox: httpx.Client, kong: Kong) -> Iterator[httpx.Client]:
    """A daemon with policy sync that has synced all consumers of this Kong."""
    with serving(kong) as admin:
        settings = f"sources: [{{type: kong-admin, url: '{admin.url}'}}]\npolicy: sync\n"
        project = Project(folder, str(sandbox.base_url), settings + "schedule: {interval: 1h}\n")
        with daemon(project) as client:
            idle(client)
            yield client


FAULTS = {
    "500 on page 7": (on_page(7, Answer({"message": "boom"}, 500)), "boom"),
    "cut on page 7": (on_page(7, Answer(cut=True)), "did not answer"),
    "token revoked on page 4": (on_page(4, Answer({"message": "Unauthorized"}, 401)), "sources[0].token"),
    "half a page": (on_page(3, Answer(b'{"data": [{"id": "x"')), "not JSON"),
    "not configured": (at("/status", Answer({"configuration_hash": "0" * 32})), "not loaded its config"),
    "status 500": (at("/status", Answer({}, 500)), "GET /status"),
}


@pytest.mark.parametrize("database", [True, False])
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_cannot_read_its_source_fails_and_removes_nothing(
    tmp_path: Path, sandbox: httpx.Client, name: str, database: bool
) -> None:
    kong = Kong(database=database)
    fault, says = FAULTS[name]
    with healthy_daemon(tmp_path, sandbox, kong) as client:
        before = customers(sandbox)
        assert len(before) == 2 * PAGES
        kong.fault = fault
        kong.change()
        failed = finished(client, client.post("/v1/syncs").json()["id"])
        assert failed["state"] == "failed"
        assert says in str(failed["error"])
        assert customers(sandbox) == before
        kong.fault = lambda _: None
        well = finished(client, client.post("/v1/syncs").json()["id"])
        assert (well["state"], well["in_sync"]) == ("succeeded", True)
        assert customers(sandbox) == before


@pytest.mark.parametrize("database", [True, False])
def test_a_kong_without_any_consumers_is_reported_and_removes_nothing(
    tmp_path: Path, sandbox: httpx.Client, database: bool
) -> None:
    kong = Kong(database=database)
    with healthy_daemon(tmp_path, sandbox, kong) as client:
        before = customers(sandbox)
        kong.fault = at("/consumers", Answer({"data": [], "next": None}))
        kong.change()
        run = finished(client, client.post("/v1/syncs").json()["id"])
        assert run["state"] == "blocked"
        assert "returned no principals" in str(run["plan"])
        assert customers(sandbox) == before
        allowed = client.post("/v1/syncs", json={"allow_empty": True}).json()
        stopped = finished(client, allowed["id"])
        assert "16 of 16 subjects (100.0 %)" in str(stopped["error"])
        assert customers(sandbox) == before
