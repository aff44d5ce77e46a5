"""Dead letters, replays and the quarantine over the HTTP API, while a delivery runs."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.harness.process import eventually
from tests.plugin.deliveries import record, rejects, spooled
from tests.plugin.events_server import Answer, take_all
from tests.plugin.operations_api import Api, api

pytestmark = pytest.mark.slow


def over(running: Api, replay: dict[str, Any]) -> dict[str, Any]:
    """What became of a replay, once it is over."""

    def done() -> dict[str, Any] | None:
        found: dict[str, Any] = running.get(f"/v1/replays/{replay['id']}")
        return found if found["waiting"] == 0 else None

    found = eventually(done, what="the replay")
    assert found
    return found


def with_dead_letters(running: Api, number: int) -> None:
    """Have so many further events refused."""
    running.events.script = rejects({f"event-{n:06d}" for n in range(100, 100 + number)} | {"event-000003"})
    spooled(running.server.spool, [record(n) for n in range(100, 100 + number)])

    def dead() -> int:
        return int(running.get("/v1/spool")["total"]["books"]["dead_lettered"])

    eventually(lambda: dead() == number + 1, what="the dead letters", seconds=30)


def test_a_group_is_replayed_and_what_became_of_it_can_be_read(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        with_dead_letters(running, 5)
        (group,) = running.get("/v1/dead-letters/groups")["groups"]
        assert (group["dead_letters"], group["status"], group["title"]) == (6, 400, "Bad Request")
        running.events.script = rejects({"event-000101"})
        body = {"group": group["id"], "up_to": group["newest_id"]}
        answer = running.client.post("/v1/dead-letters/replay", json=body)
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/v1/replays/{answer.json()['id']}"
        done = over(running, answer.json())
        assert (done["marked"], done["delivered"], done["refused"]) == (6, 5, 1)
        (letter,) = running.get("/v1/dead-letters")["dead_letters"]
        assert letter["event_id"] == "event-000101"
        whole = running.get(f"/v1/dead-letters/{letter['id']}")
        assert whole["event"]["id"] == "event-000101"
        assert running.client.get("/v1/dead-letters/4711").status_code == 404
        assert running.client.get("/v1/replays/4711").status_code == 404
        assert [found["id"] for found in running.get("/v1/replays")["replays"]] == [done["id"]]


def test_replays_at_the_same_time_send_each_event_once_while_delivery_runs(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        with_dead_letters(running, 60)
        running.events.script = take_all
        before = running.events.came.copy()
        marked: list[int] = []
        bodies = [{"all": True}] * 4 + [{"ids": list(range(1, 70))}] * 4

        def ask(body: dict[str, Any]) -> None:
            marked.append(running.client.post("/v1/dead-letters/replay", json=body).json()["marked"])

        threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        spooled(running.server.spool, [record(n) for n in range(500, 540)])
        for thread in threads:
            thread.join()
        assert sum(marked) == 61, "each is marked by one of them"
        eventually(
            lambda: not running.get("/v1/dead-letters")["dead_letters"], what="the replays", seconds=30
        )
        eventually(lambda: running.get("/v1/spool")["total"]["backlog"] == 0, what="the rest")
        sent = running.events.came - before
        wanted = [f"event-{n:06d}" for n in (3, *range(100, 160), *range(500, 540))]
        assert sent == Counter(wanted), "none twice, none missing"
        books = running.get("/v1/spool")["total"]["books"]
        assert (books["events"], books["delivered"], books["dead_lettered"]) == (106, 106, 0)


def test_a_second_replay_of_what_is_under_way_marks_nothing(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        with_dead_letters(running, 3)
        running.events.script = lambda _: Answer(503)
        first = running.client.post("/v1/dead-letters/replay", json={"all": True}).json()
        assert first["marked"] == 4
        assert running.client.post("/v1/dead-letters/replay", json={"all": True}).json()["marked"] == 0
        assert running.get("/v1/dead-letters/groups")["to_be_replayed"] == 4
        running.events.script = take_all
        assert over(running, first)["delivered"] == 4


@pytest.mark.parametrize(
    "body", [{}, {"ids": [1], "all": True}, {"group": "0" * 16, "all": True}, {"group": "x"}, {"ids": []}]
)
def test_a_replay_names_exactly_one_kind_of_selection(running_api: Api, body: dict[str, Any]) -> None:
    assert running_api.client.post("/v1/dead-letters/replay", json=body).status_code == 422


def test_the_quarantine_can_be_read(running_api: Api) -> None:
    assert running_api.get("/v1/quarantine/groups") == {"groups": [], "further_groups": 0, "requests": 0}
    assert running_api.get("/v1/quarantine", reason="no_consumer") == {"requests": [], "next": None}
