"""The refresh against a real metering API: what it asks for, what it keeps, and that nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import yaml

from syncd.config import settings
from syncd.config.settings import Config
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER
from syncd.state.database import State
from syncd.state.location import StateLocation
from syncd.usage.days import Days
from syncd.usage.refresh import Refresher, wanted_meters
from syncd.usage.store import UsageStore
from tests.syncd.sandbox.support import event, send, tokens
from tests.syncd.servers import Answer, Asked, serving

TODAY = datetime(2026, 11, 29, 12, tzinfo=UTC)
ALL = Days(date(2026, 9, 1), date(2026, 12, 1))

pytestmark = pytest.mark.slow


class World:
    """A refresher on a folder, at a time that the test moves."""

    def __init__(self, folder: Path, url: str, dialect: str = "openmeter-v1", **more: object) -> None:
        self.folder = folder
        self.now = TODAY
        self.path = folder / "syncd.yaml"
        document = {
            "sources": [{"type": "static", "subjects": []}],
            "metering": {"url": url, "dialect": dialect, "attempts": 1},
            **more,
        }
        self.path.write_text(yaml.safe_dump(document))
        self.most_days = 60

    @property
    def config(self) -> Config:
        return settings.load(self.path)

    @contextmanager
    def open(self) -> Iterator[tuple[Refresher, UsageStore]]:
        """Open the state anew, as after a restart."""
        with State(StateLocation(self.folder / "state")) as state:
            store = UsageStore(state)
            yield Refresher(store, lambda: self.config, lambda: self.now, most_days=self.most_days), store

    def refresh(self) -> int:
        with self.open() as (refresher, _):
            done = refresher.refresh()
            assert done.problem is None, done.problem
            return done.days

    def kept(self, meter: str = REQUESTS_METER, days: Days = ALL) -> dict[str, float]:
        with self.open() as (_, store):
            return store.by_subject(meter, days)


@pytest.fixture(params=["openmeter-v1", "openmeter-v3"])
def world(request: pytest.FixtureRequest, tmp_path: Path, sandbox: httpx.Client) -> World:
    return World(tmp_path, str(sandbox.base_url), request.param)


def at(day: str, clock: str = "10:00:00") -> str:
    return f"{day}T{clock}Z"


def test_usage_is_kept_as_the_metering_api_has_it(world: World, sandbox: httpx.Client) -> None:
    model = {"tokens": 70, "model": "tiny", "type": "input"}
    send(
        sandbox,
        event("1", subject="alice", time=at("2026-11-28"), data={"route_name": "orders"}),
        event("2", subject="alice", time=at("2026-11-29"), data={"route_name": "search"}),
        event("3", subject="nobody", time=at("2026-10-01"), data={}),
        tokens("4", 70, subject="alice", time=at("2026-11-28"), data=model),
    ).raise_for_status()
    assert world.refresh() == 4
    with world.open() as (_, store):
        assert store.by_subject(REQUESTS_METER, ALL) == {"alice": 2, "nobody": 1}
        assert store.by_dimension(REQUESTS_METER, ALL, "route_name") == {"orders": 1, "search": 1, "": 1}
        assert store.by_dimension(TOKENS_METER, ALL, "model") == {"tiny": 70}
        assert store.by_dimension(TOKENS_METER, ALL, "type") == {"input": 70}


def test_only_days_that_have_changed_are_fetched_again(world: World, sandbox: httpx.Client) -> None:
    send(sandbox, event("1", time=at("2026-11-27")), event("2", time=at("2026-11-29"))).raise_for_status()
    assert world.refresh() == 2
    assert world.refresh() == 0
    send(sandbox, event("3", time=at("2026-11-29"))).raise_for_status()
    assert world.refresh() == 1
    assert world.kept() == {"alice": 3}


def test_late_events_arrive_and_are_named(world: World, sandbox: httpx.Client) -> None:
    send(sandbox, event("1", time=at("2026-11-10")), event("2", time=at("2026-11-28"))).raise_for_status()
    world.refresh()
    world.now += timedelta(hours=1)
    send(
        sandbox,
        event("3", time=at("2026-11-10")),
        event("4", time=at("2026-11-11"), subject="bob"),
        event("5", time=at("2026-11-28")),
    ).raise_for_status()
    assert world.refresh() == 3
    assert world.kept() == {"alice": 4, "bob": 1}
    with world.open() as (_, store):
        found = [(late.day.day, late.subject, late.value, late.seen_at) for late in store.late(ALL)]
    assert sorted(found) == [(10, "alice", 1, world.now), (11, "bob", 1, world.now)], (
        "the day before is not late, and a day without usage until now is"
    )


def test_what_is_fetched_for_the_first_time_is_not_late(world: World, sandbox: httpx.Client) -> None:
    world.most_days = 2
    send(sandbox, *(event(str(day), time=at(f"2026-10-{day:02}")) for day in range(1, 6))).raise_for_status()
    with world.open() as (refresher, store):
        done = refresher.refresh()
        assert (done.days, done.remaining) == (2, 3)
        assert store.by_subject(REQUESTS_METER, ALL) == {"alice": 2}, "the newest days first"
        assert store.meter(REQUESTS_METER).refreshed_at is None
    assert [world.refresh(), world.refresh(), world.refresh()] == [2, 1, 0]
    assert world.kept() == {"alice": 5}
    with world.open() as (_, store):
        assert store.late(ALL) == ()
        assert store.meter(REQUESTS_METER).refreshed_at == world.now


def test_a_refresh_that_is_stopped_goes_on_after_the_restart(world: World, sandbox: httpx.Client) -> None:
    send(sandbox, *(event(str(day), time=at(f"2026-10-{day:02}")) for day in range(1, 6))).raise_for_status()
    stopping = threading.Event()
    with State(StateLocation(world.folder / "state")) as state:

        class StopsAfterOneDay(UsageStore):
            def replace_day(self, *arguments: object, **named: object) -> float:
                stopping.set()
                return super().replace_day(*arguments, **named)  # type: ignore[arg-type]

        store = StopsAfterOneDay(state)
        done = Refresher(store, lambda: world.config, lambda: world.now, stopping=stopping).refresh()
        assert (done.days, done.remaining) == (1, 4)
    assert world.refresh() == 4
    assert world.kept() == {"alice": 5}


def test_prices_bring_their_meters_and_dimensions(tmp_path: Path) -> None:
    rates = [{"meter": "kong_llm_calls", "where": {"provider": "openai"}, "amount": 1}]
    rates += [{"meter": TOKENS_METER, "where": {"provider": "openai", "type": "input"}, "amount": 1}]
    world = World(tmp_path, "http://127.0.0.1:1", prices={"currency": "EUR", "rates": rates})
    assert wanted_meters(world.config) == {
        REQUESTS_METER: ("route_name",),
        TOKENS_METER: ("model", "type", "provider"),
        "kong_llm_calls": ("provider",),
    }


def test_a_meter_that_cannot_be_kept_says_why_and_the_others_are_kept(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    made = {"slug": "peak", "name": "Peak", "aggregation": "MAX", "eventType": "kong.api_request"}
    sandbox.post("/api/v1/meters", json={**made, "valueProperty": "$.status"}).raise_for_status()
    meters = {"peak": [], "absent": [], REQUESTS_METER: ["route_name", "colour"]}
    world = World(tmp_path, str(sandbox.base_url), usage={"meters": meters})
    send(sandbox, event("1", time=at("2026-11-29"))).raise_for_status()
    world.refresh()
    with world.open() as (_, store):
        problems = {kept.meter: kept.problem or "" for kept in store.meters()}
        assert "has no such meter" in problems["absent"]
        assert "its aggregation is max" in problems["peak"]
        assert problems[REQUESTS_METER] == "the meter has no dimension colour"
        assert store.meter("peak").refreshed_at is None
        assert store.by_dimension(REQUESTS_METER, ALL, "route_name") == {"search": 1}


def test_an_api_that_fails_leaves_what_was_kept_and_is_named(tmp_path: Path, sandbox: httpx.Client) -> None:
    world = World(tmp_path, str(sandbox.base_url))
    send(sandbox, event("1", time=at("2026-11-29"))).raise_for_status()
    world.refresh()
    down = World(tmp_path, "http://127.0.0.1:1")
    with down.open() as (refresher, store):
        done = refresher.refresh()
        assert done.problem is not None
        assert "127.0.0.1:1" in done.problem
        assert store.by_subject(REQUESTS_METER, ALL) == {"alice": 1}


def test_a_day_that_never_adds_up_is_not_fetched_again_and_again(tmp_path: Path) -> None:
    """A server whose total of a day differs from its rows costs one request, not one for each refresh."""

    def answer(asked: Asked) -> Answer:
        if asked.path == "/api/v1/meters":
            meter = {"slug": REQUESTS_METER, "aggregation": "COUNT", "eventType": "kong.api_request"}
            return Answer([{**meter, "groupBy": {}}])
        if asked.path.endswith("/query"):
            window = {"windowStart": at("2026-11-10", "00:00:00"), "windowEnd": at("2026-11-11", "00:00:00")}
            rows: list[dict[str, object]] = [{**window, "value": 7, "subject": None, "groupBy": {}}]
            if "windowSize" not in asked.query:
                rows = [{**window, "value": 5, "subject": "alice", "groupBy": {}}]
            return Answer({"data": rows})
        return Answer(status=404)

    with serving(answer) as server:
        world = World(tmp_path, server.url, usage={"meters": {REQUESTS_METER: []}})
        assert [world.refresh(), world.refresh()] == [1, 0]
        assert world.kept() == {"alice": 5}


def test_one_late_token_among_billions_is_fetched(tmp_path: Path) -> None:
    tokens_of_the_day = 5_000_000_000

    def answer(asked: Asked) -> Answer:
        if asked.path == "/api/v1/meters":
            meter = {"slug": TOKENS_METER, "aggregation": "SUM", "eventType": "kong.llm_request"}
            return Answer([{**meter, "valueProperty": "$.tokens", "groupBy": {}}])
        if asked.path.endswith("/query"):
            window = {"windowStart": at("2026-11-10", "00:00:00"), "windowEnd": at("2026-11-11", "00:00:00")}
            subject = "alice" if "windowSize" not in asked.query else None
            return Answer(
                {"data": [{**window, "value": tokens_of_the_day, "subject": subject, "groupBy": {}}]}
            )
        return Answer(status=404)

    with serving(answer) as server:
        world = World(tmp_path, server.url, usage={"meters": {TOKENS_METER: []}})
        assert world.refresh() == 1
        tokens_of_the_day += 1
        assert world.refresh() == 1
        assert world.kept(TOKENS_METER) == {"alice": tokens_of_the_day}


def test_a_list_of_meters_that_lacks_one_deletes_nothing_of_what_is_kept(tmp_path: Path) -> None:
    listed = True

    def answer(asked: Asked) -> Answer:
        if asked.path == "/api/v1/meters":
            meter = {"slug": REQUESTS_METER, "aggregation": "COUNT", "eventType": "kong.api_request"}
            return Answer([{**meter, "groupBy": {"route_name": "$.route_name"}}] if listed else [])
        if asked.path.endswith("/query"):
            window = {"windowStart": at("2026-11-10", "00:00:00"), "windowEnd": at("2026-11-11", "00:00:00")}
            labels = {"route_name": "orders"} if "groupBy" in asked.query else {}
            subject = "alice" if labels else None
            return Answer({"data": [{**window, "value": 5, "subject": subject, "groupBy": labels}]})
        return Answer(status=404)

    with serving(answer) as server:
        world = World(tmp_path, server.url, usage={"meters": {REQUESTS_METER: ["route_name"]}})
        assert world.refresh() == 1
        listed = False
        assert world.refresh() == 0
        with world.open() as (_, store):
            assert "has no such meter" in (store.meter(REQUESTS_METER).problem or "")
            assert store.by_dimension(REQUESTS_METER, ALL, "route_name") == {"orders": 5}
        listed = True
        assert world.refresh() == 0
        with world.open() as (_, store):
            assert store.meter(REQUESTS_METER).problem is None


def test_the_requests_of_a_refresh_are_those_that_the_settings_page_promises(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.path == "/api/v1/meters":
            names = (REQUESTS_METER, TOKENS_METER)
            listed = [{"slug": name, "aggregation": "SUM", "eventType": "x", "groupBy": {}} for name in names]
            return Answer(listed)
        if asked.path.endswith("/query"):
            return Answer({"data": []})
        return Answer(status=404)

    with serving(answer) as server:
        world = World(tmp_path, server.url)
        world.refresh()
        queries = [asked for asked in server.asked if asked.path.endswith("/query")]
        assert [asked.query.get("windowSize") for asked in queries] == ["DAY", "DAY"]
        assert len(server.asked) == 1 + 2, server.paths()
