"""Helpers for tests of `syncd audit`: gateways with past traffic, and a metering API that loses events."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson

from syncd.config.sections import GatewayConfig
from syncd.gateways.client import Gateway
from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import Recorded, llm_request, serialized
from tests.syncd.processes import Project

TOKEN = "token-of-the-api-of-each-gateway"
HOUR = timedelta(hours=1)
NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def hours_ago(number: int) -> datetime:
    """The start of a past hour."""
    return NOW - number * HOUR


def subject_of(consumer: str) -> str:
    return f"consumer:{consumer}"


def recorded(consumer: str, hour: datetime, *, llm: bool = False, request_id: str | None = None) -> Recorded:
    """A request of a consumer in the middle of an hour; with `llm` it makes two more events, of tokens."""
    request = llm_request() if llm else serialized("authenticated")
    log = orjson.loads(request.log)
    log["request"]["id"] = request_id or uuid.uuid4().hex
    log["started_at"] = int((hour + HOUR / 2).timestamp() * 1000)
    log["consumer"] = {"id": consumer, "username": consumer, "tags": []}
    return Recorded(request.name, orjson.dumps(log), request.application)


@dataclass
class Site:
    """A gateway: its plugin server, and its settings for syncd."""

    name: str
    server: PluginServer
    url: str
    config: dict[str, object]
    events: int = 0

    @property
    def settings(self) -> dict[str, object]:
        return {"name": self.name, "url": self.url, "token": TOKEN}

    @contextmanager
    def client(self) -> Iterator[Gateway]:
        with closing(Gateway(GatewayConfig.model_validate(self.settings))) as gateway:
            yield gateway

    def serve(
        self,
        consumer: str,
        hour: datetime,
        number: int,
        *,
        llm: bool = False,
        settled: bool = True,
        request_id: str | None = None,
        **config: object,
    ) -> None:
        """Log requests of an hour; with `settled`, wait until the plugin has finished their events."""
        plugin = PluginInstance(self.config | config)
        logs = (recorded(consumer, hour, llm=llm, request_id=request_id) for _ in range(number))
        requests = [(plugin, log, str(n)) for n, log in enumerate(logs)]

        async def run() -> None:
            worker = KongWorker(self.server.socket)
            await drive(worker, iter(requests), concurrency=4)
            await worker.close()
            assert len(worker.tally.acknowledged) == number

        asyncio.run(run())
        self.events += number * (3 if llm else 1)
        if settled:
            self.settle()

    def settle(self) -> None:
        with self.client() as gateway:

            def done() -> bool:
                total = gateway.spool().total
                return total.backlog == 0 and total.books.events == self.events

            eventually(done, what="delivery")


@contextmanager
def site(folder: Path, name: str, metering: str, *arguments: str) -> Iterator[Site]:
    """Run a gateway's plugin server with its API, delivering to this metering API."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "log").unlink(missing_ok=True)  # of an earlier one on the same spool
    environment = {"OPENMETER_PLUGIN_ADMIN_TOKEN": TOKEN}
    api = () if "--api" in arguments else ("--api", "127.0.0.1:0")
    with plugin_server(folder / name, *api, *arguments, environment=environment) as server:
        address = r'"on": ?\[[^]]*"(127\.0\.0\.1:\d+)"' if api else r'"on": ?\[[^]]*"(/[^"]*/api)"'
        found = eventually(lambda: re.findall(address, server.log_text()), what="listening")[0]
        config: dict[str, object] = {
            "ingest_endpoint": f"{metering}/api/v1/events",
            "queue": {"max_coalescing_delay": 0.05, "initial_retry_delay": 0.02, "max_retry_delay": 0.1},
        }
        running = Site(name, server, f"http://{found}" if api else f"unix:{found}", config)
        with running.client() as gateway:
            eventually(lambda: gateway.readiness().ready, what="readiness")
        yield running


@dataclass
class Metering:
    """A sandbox whose events tests can lose or duplicate."""

    url: str
    db: Path

    def lose(self, consumer: str, hour: datetime, number: int, kind: str = "kong.api_request") -> None:
        """Delete some events of an hour."""
        start = int(hour.timestamp())
        with closing(sqlite3.connect(self.db, timeout=10)) as db, db:
            deleted = db.execute(
                "DELETE FROM events WHERE rowid IN (SELECT rowid FROM events WHERE subject = ? AND type = ?"
                " AND time >= ? AND time < ? LIMIT ?)",
                (subject_of(consumer), kind, start, start + 3600, number),
            ).rowcount
        assert deleted == number

    @contextmanager
    def remembering_ids(self) -> Iterator[None]:
        """Accept events and store none, as for ids that a deduplication remembers."""
        with closing(sqlite3.connect(self.db, timeout=10)) as db:
            db.execute("CREATE TRIGGER remembered BEFORE INSERT ON events BEGIN SELECT RAISE(IGNORE); END")
            try:
                yield
            finally:
                db.execute("DROP TRIGGER remembered")

    def count_twice(self, consumer: str, hour: datetime, number: int) -> None:
        """Ingest events of an hour again, as a server does that does not deduplicate."""
        for event in self.events(consumer, hour)[:number]:
            self.ingest(event | {"id": f"{event['id']}-again"})

    def ingest(self, event: dict[str, Any]) -> None:
        headers = {"content-type": "application/cloudevents+json"}
        httpx.post(f"{self.url}/api/v1/events", json=event, headers=headers).raise_for_status()

    def events(self, consumer: str, hour: datetime) -> list[dict[str, Any]]:
        found = httpx.get(f"{self.url}/api/v1/events", params={"subject": subject_of(consumer)}).json()
        day = hour.strftime("%Y-%m-%dT%H")
        return [entry["event"] for entry in found if entry["event"]["time"].startswith(day)]

    def fault(self, **fault: object) -> None:
        httpx.post(f"{self.url}/sandbox/v1/faults", json=fault).raise_for_status()

    def clear_faults(self) -> None:
        httpx.delete(f"{self.url}/sandbox/v1/faults").raise_for_status()


@contextmanager
def metering(folder: Path) -> Iterator[Metering]:
    with running_sandbox(folder / "sandbox.sqlite3") as url:
        yield Metering(url, folder / "sandbox.sqlite3")


@dataclass
class Audited:
    """A metering API, gateways, and `syncd audit` of them."""

    folder: Path
    metering: Metering
    sites: list[Site]
    dialect: str = "openmeter-v1"
    gateways: list[dict[str, object]] = field(default_factory=list)

    def project(self, **metering: object) -> Project:
        folder = self.folder / f"syncd-{uuid.uuid4().hex}"
        folder.mkdir()
        project = Project(folder, self.metering.url)
        document = {
            "sources": [{"type": "declarative-file", "path": "kong.yml"}],
            "metering": {
                "dialect": self.dialect,
                "url": self.metering.url,
                "attempts": 1,
                "dedupe_expiration": "90d",  # the sandbox remembers all ids
                **metering,
            },
            "gateways": self.gateways or [one.settings for one in self.sites],
        }
        project.config.write_text(json.dumps(document))  # JSON is YAML
        return project

    def audit(self, *hours: datetime, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any], str]:
        """Audit from the first of these hours to the end of the last: status, document, errors."""
        result = self.project().call("audit", *span(*hours), "--output=json", "--settle", "0", *arguments)
        return result.returncode, json.loads(result.stdout) if result.stdout else {}, result.stderr


def span(*hours: datetime) -> tuple[str, ...]:
    return "--from", min(hours).isoformat(), "--to", (max(hours) + HOUR).isoformat()


def found(document: dict[str, Any]) -> list[tuple[datetime, str, int, int, int]]:
    """The differences in short: hour, subject, missing, refused, surplus."""
    return [
        (
            datetime.fromisoformat(one["hour"]),
            one["subject"],
            one["missing"],
            one["refused"],
            one["surplus"],
        )
        for one in document["differences"]
    ]


@contextmanager
def audited(folder: Path, *names: str, dialect: str = "openmeter-v1") -> Iterator[Audited]:
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        api = stack.enter_context(metering(folder))
        sites = [stack.enter_context(site(folder, name, api.url)) for name in names]
        yield Audited(folder, api, sites, dialect)
