"""Notifications of a running daemon: each once, also across restarts, and never in the way of a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.config.settings import Config
from syncd.core.errors import ConfigError, StateError
from syncd.customers.directory import Directory
from syncd.daemon.service import running
from syncd.metering.base import GroupedValue
from syncd.notify.store import Notices
from syncd.notify.watch import Waker, Watch
from syncd.runs.history import History
from syncd.runs.queue import RunQueue
from syncd.sandbox.testing import running_sandbox
from syncd.state.database import State
from syncd.state.location import StateLocation
from syncd.usage.report import Reports
from syncd.usage.store import UsageStore
from tests.harness.process import eventually
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway
from tests.syncd.notify.test_sending import apprise_url
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow


@dataclass
class Channel:
    """A service that takes messages, or answers otherwise."""

    url: str = ""
    status: int = 200
    titles: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)

    def answer(self, asked: Asked) -> Answer:
        if self.status == 200:
            assert isinstance(asked.body, dict)
            self.titles.append(asked.body["title"])
            self.bodies.append(asked.body["message"])
        return Answer({}, self.status)


@contextmanager
def channel() -> Iterator[Channel]:
    found = Channel()
    with serving(found.answer) as server:
        found.url = apprise_url(server.url, "secret-hook-path")
        yield found


@dataclass
class World:
    """A Watch without its thread, on an empty queue."""

    watch: Watch
    notices: Notices
    state: State
    now: datetime
    config: Config
    usage: UsageStore


@contextmanager
def world(folder: Path, text: str, now: datetime | None = None) -> Iterator[World]:
    path = folder / "syncd.yaml"
    path.write_text(
        "sources: [{type: static, subjects: []}]\nmetering: {url: 'http://127.0.0.1:9'}\n"
        f"daemon: {{state_dir: state}}\n{text}"
    )
    config = settings.load(path)
    stopping = threading.Event()

    def never(*_: object, **__: object) -> object:
        raise AssertionError

    with State(StateLocation(folder / "state")) as state:
        notices = Notices(state)
        runs = RunQueue(never, stopping)  # type: ignore[arg-type]
        usage = UsageStore(state)
        found = World(None, notices, state, now or datetime.now(UTC), config, usage)  # type: ignore[arg-type]
        found.watch = Watch(
            runs,
            History(state),
            notices,
            lambda: config,
            Waker(),
            stopping,
            lambda: found.now,
            reports=Reports(usage, Directory(state)),
        )
        yield found


def test_dead_letters_are_sent_once_and_again_after_they_were_gone(tmp_path: Path) -> None:
    fake = FakeGateway(dead=[dead_letter(1)])
    with channel() as there, gateway(fake) as plugin:
        text = f"notify: {{urls: ['{there.url}']}}\n{configured(eu=plugin.url)}"
        with world(tmp_path, text) as found:
            for _ in range(3):
                found.watch.look()
            assert there.titles == ["syncd default: the metering API refused events"]
            assert [notice.topic for notice in found.notices.holding()] == ["dead-letters"]
        with world(tmp_path, text) as found:
            found.watch.look()
            assert len(there.titles) == 1, "also across a restart"
            fake.dead.clear()
            found.watch.look()
            assert found.notices.holding() == []
            fake.dead.append(dead_letter(2))
            found.watch.look()
            assert len(there.titles) == 2


@contextmanager
def taking_no_notices(state: State) -> Iterator[None]:
    """Have every write of a notice fail, as on a full disk."""
    triggers = {f"no_{write}": write for write in ("INSERT", "UPDATE")}
    with state.writing() as connection:
        for name, write in triggers.items():
            full = "SELECT RAISE(FAIL, 'database or disk is full')"
            connection.exec_driver_sql(f"CREATE TRIGGER {name} BEFORE {write} ON notices BEGIN {full}; END")
    yield
    with state.writing() as connection:
        for name in triggers:
            connection.exec_driver_sql(f"DROP TRIGGER {name}")


def test_while_the_state_takes_nothing_a_message_is_sent_once_and_noted_later(tmp_path: Path) -> None:
    with channel() as there, gateway(FakeGateway(dead=[dead_letter(1)])) as plugin:
        text = f"notify: {{urls: ['{there.url}']}}\n{configured(eu=plugin.url)}"
        with world(tmp_path, text) as found:
            found.notices.keep_summary(found.now - timedelta(days=8))
            with taking_no_notices(found.state):
                for _ in range(3):
                    with suppress(StateError):
                        found.watch.look()
                assert found.notices.holding() == []
            found.watch.look()
            assert [notice.topic for notice in found.notices.holding()] == ["dead-letters"]
        assert there.titles == [
            "syncd default: the metering API refused events",
            "syncd default: weekly summary",
        ]


def test_what_was_over_is_sent_again_also_while_the_state_takes_nothing(tmp_path: Path) -> None:
    fake = FakeGateway(dead=[dead_letter(1)])
    with channel() as there, gateway(fake) as plugin:
        text = f"notify: {{urls: ['{there.url}']}}\n{configured(eu=plugin.url)}"
        with world(tmp_path, text) as found:
            found.notices.keep_summary(found.now)
            with taking_no_notices(found.state):
                found.watch.look()
                fake.dead.clear()
                found.watch.look()
                fake.dead.append(dead_letter(2))
                for _ in range(2):
                    found.watch.look()
        assert there.titles == ["syncd default: the metering API refused events"] * 2


def test_what_nobody_took_is_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with channel() as there, gateway(FakeGateway(dead=[dead_letter(1)])) as plugin:
        there.status = 500
        text = f"notify: {{urls: ['{there.url}']}}\n{configured(eu=plugin.url)}"
        with world(tmp_path, text) as found:
            found.watch.look()
            assert found.notices.sent() == {}
            there.status = 200
            found.watch.look()
            assert there.titles == [], "after a pause, so that a dead service costs little"
            monkeypatch.setattr(found.watch, "_not_before", 0.0)
            found.watch.look()
            assert len(there.titles) == 1


def test_a_url_that_failed_gets_the_message_that_another_one_took(tmp_path: Path) -> None:
    with channel() as one, channel() as other, gateway(FakeGateway(dead=[dead_letter(1)])) as plugin:
        other.status = 500
        text = f"notify: {{urls: ['{one.url}', '{other.url}']}}\n{configured(eu=plugin.url)}"
        with world(tmp_path, text) as found:
            found.watch.look()
            other.status = 200
            found.watch.look()
            found.watch.look()
            assert (len(one.titles), len(other.titles)) == (1, 1)


def test_the_summary_comes_weekly_and_not_at_the_first_start(tmp_path: Path) -> None:
    monday = datetime(2026, 11, 30, 8, tzinfo=UTC)
    with channel() as there:
        text = f"notify: {{urls: ['{there.url}']}}\n"
        with world(tmp_path, text, monday - timedelta(days=3)) as found:
            found.watch.look()
            found.now = monday - timedelta(minutes=1)
            found.watch.look()
            assert there.titles == []
            found.now = monday + timedelta(minutes=1)
            for _ in range(2):
                found.watch.look()
            assert there.titles == ["syncd default: weekly summary"]
            assert there.bodies[0].startswith("The seven days to 2026-11-30:")
            found.now += timedelta(days=7)
            found.watch.look()
            assert len(there.titles) == 2


def test_the_summary_has_the_usage_of_the_seven_days_before_it_with_its_estimate(tmp_path: Path) -> None:
    tuesday = datetime(2026, 12, 8, 8, tzinfo=UTC)
    prices = "prices: {currency: EUR, rates: [{meter: kong_api_requests, amount: 0.5}]}\n"
    with channel() as there:
        text = f"notify: {{urls: ['{there.url}'], summary: '0 8 * * 2'}}\n{prices}"
        with world(tmp_path, text, tuesday - timedelta(days=1)) as found:
            found.watch.look()
            found.usage.keep_meter("kong_api_requests", ())
            # The week begins with its month: it is compared with the last week of November, not its first.
            for day, value in (
                ("11-01", 70),
                ("11-23", 50),
                ("11-24", 2),
                ("11-30", 2),
                ("12-01", 3),
                ("12-07", 4),
                ("12-08", 9),
            ):
                rows = [GroupedValue("a", (), value)]
                found.usage.replace_day(
                    "kong_api_requests", date.fromisoformat(f"2026-{day}"), rows, value, tuesday, late=False
                )
            found.usage.note_complete("kong_api_requests", date(2026, 11, 1), tuesday, None)
            found.now = tuesday
            found.watch.look()
    assert there.bodies[0].splitlines()[2:4] == [
        "- requests: 7 (+75.0 % against the week before)",
        "- estimate: 3.50 EUR (+75.0 % against the week before)",
    ]


def test_a_daemon_sends_a_failed_run_once_and_shows_no_secret(tmp_path: Path) -> None:
    with running_sandbox() as url, channel() as there:
        project = Project(tmp_path, url)
        (tmp_path / "kong.yml").write_text("consumers: 7\n")
        project.configure(
            f"daemon: {{listen: '127.0.0.1:0', state_dir: state}}\nnotify: {{urls: ['{there.url}']}}\n"
        )
        with running(settings.load(project.config)) as daemon:
            eventually(lambda: len(there.titles) == 1, what="the message", seconds=30)
            with httpx.Client(base_url=daemon.address.url) as client:
                for _ in range(2):
                    client.post("/v1/syncs", json={}).raise_for_status()
                    time.sleep(0)
                eventually(lambda: client.get("/v1/status").json()["state"] == "idle")
                for path in ("/v1/status", "/dashboard/", "/metrics"):
                    assert "secret-hook-path" not in client.get(path).text
        assert there.titles == ["syncd default: the last run failed"]
        assert "kong.yml" in there.bodies[0]


def test_a_service_that_hangs_delays_neither_a_run_nor_the_stop(tmp_path: Path) -> None:
    release, asked_for = threading.Event(), threading.Event()

    def hang(_: Asked) -> Answer:
        asked_for.set()
        release.wait(60)
        return Answer({})

    with running_sandbox() as url, serving(hang) as there:
        project = Project(tmp_path, url)
        (tmp_path / "kong.yml").write_text("consumers: 7\n")
        hook = apprise_url(there.url) + "?rto=60"
        project.configure(
            "daemon: {listen: '127.0.0.1:0', state_dir: state}\n"
            f"notify: {{urls: ['{hook}'], timeout: 1h}}\n"
        )
        with running(settings.load(project.config)) as daemon:
            assert asked_for.wait(30)
            with httpx.Client(base_url=daemon.address.url) as client:
                began = time.monotonic()
                run_id = client.post("/v1/syncs", json={}).json()["id"]
                ended = ("failed", "succeeded")
                eventually(lambda: client.get(f"/v1/syncs/{run_id}").json()["state"] in ended)
                assert time.monotonic() - began < 10
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert daemon.unfinished == ()
        release.set()


def test_without_urls_nothing_is_read_or_sent(tmp_path: Path) -> None:
    with (
        gateway(FakeGateway(dead=[dead_letter(1)])) as plugin,
        world(tmp_path, configured(eu=plugin.url)) as found,
    ):
        found.watch.look()
        assert found.notices.sent() == {}


def test_the_missing_extra_is_said_where_the_configuration_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncd.config.sections.find_spec", lambda _: None)
    with world(tmp_path, "notify: {urls: ['json://127.0.0.1:9/secret-part']}\n") as found:
        with pytest.raises(ConfigError, match=r"pip install 'kong-openmeter\[notify\]'") as error:
            found.config.notify.check()
        assert "secret-part" not in str(error.value)
        assert "secret-part" not in repr(found.config)
    with pytest.raises(ConfigError), running(found.config):
        pass


def test_a_url_that_is_none_is_refused_without_showing_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="must be an Apprise URL") as error,
        world(tmp_path, "notify: {urls: ['secret-without-schema']}\n"),
    ):
        pass
    assert "secret-without-schema" not in str(error.value)


def test_the_command_sends_a_test_message_and_lists_what_holds(tmp_path: Path) -> None:
    with running_sandbox() as url, channel() as there:
        project = Project(tmp_path, url)
        project.configure(
            f"daemon: {{state_dir: state}}\nnotify: {{urls: ['{there.url}', 'json://127.0.0.1:9/secret']}}\n"
        )
        result = project.call("notify", "--test")
        assert result.returncode == 1
        assert result.stdout == "sent to notify.urls[0] (json)\n"
        assert "notify.urls[1] (json) failed: " in result.stderr
        assert "secret" not in result.stdout + result.stderr
        assert there.titles == ["syncd default: test"]
        assert project.call("notify").stdout == "nothing was sent yet\n"
        assert json.loads(project.call("notify", "-o", "json").stdout) == {"notices": []}
        project.configure("daemon: {state_dir: state}\n")
        assert "notify.urls is empty" in project.call("notify", "--test").stderr
