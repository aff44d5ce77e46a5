"""A metering API and gateways that had traffic in a month, and the closing of that month."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from syncd.close.closing import Closing, opened
from syncd.close.report import Month
from syncd.config import settings
from syncd.runs.ignored import IgnoredEntry
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send, tokens
from tests.syncd.servers import Answer, Asked, serving

NOW = datetime.now(UTC)
MONTH = Month.parse(f"{NOW.replace(day=1) - timedelta(days=1):%Y-%m}")
"""The latest month that has ended."""
BEFORE = Month.parse(f"{MONTH.since - timedelta(days=1):%Y-%m}")
CLOSABLE = MONTH.until + timedelta(hours=1)
HERE = "aaaabbbbccccdddd"
ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"
"""The subject of alice in kong.yml, whose customer is acme."""


@dataclass
class LedgerGateway(FakeGateway):
    """A gateway with a ledger: (hour, type, subject) -> delivered, and hours with waiting events."""

    endpoint: str = ""
    ledger: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    lost_events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    waiting: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    discarded: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Refused events that are no dead letters any more."""
    pruned_up_to: str | None = None
    endless: bool = False
    """Whether each page of dead letters names itself as the next one."""

    def answer(self, asked: Asked) -> Answer:
        if self.endless and asked.path == "/v1/dead-letters":
            return Answer({"dead_letters": [dead_letter(1)], "next": 1})
        if asked.path != "/v1/ledger" or not self.ready:
            return super().answer(asked) if self.ready else Answer({"detail": "starting"}, 503)
        since, until = asked.query["from"][:13], asked.query["to"][:13]
        keys = self.ledger.keys() | self.lost_events.keys() | self.waiting.keys() | self.refused.keys()
        lines = [self._line(key) for key in sorted(keys) if since <= key[0] < until]
        waiting = sorted({line["hour"] for line in lines if line["waiting"]})
        return Answer(
            {
                "lines": lines,
                "hours_with_waiting_events": waiting,
                "pruned_up_to": self.pruned_up_to,
                "next": None,
            }
        )

    @property
    def refused(self) -> Counter[tuple[str, str, str]]:
        """The dead letters by line of the ledger."""
        listed = Counter((one["time"][:13], one["type"], one["subject"]) for one in self.dead)
        return listed + self.discarded

    def _line(self, key: tuple[str, str, str]) -> dict[str, Any]:
        delivered, waiting, lost = self.ledger[key], self.waiting[key], self.lost_events[key]
        hour, kind, subject = key
        dead = self.refused[key]
        return {
            "destination": HERE,
            "hour": hour,
            "type": kind,
            "subject": subject,
            "accepted": delivered + waiting + lost + dead,
            "delivered": delivered,
            "dead_lettered": dead,
            "lost": lost,
            "waiting": waiting,
        }

    def spool(self) -> dict[str, Any]:
        found = super().spool()
        found["destinations"][0]["endpoint"] = self.endpoint
        return found


@dataclass
class World:
    """The month's traffic goes to the metering API and to the gateways' ledgers alike."""

    project: Project
    sandbox: httpx.Client
    gateways: dict[str, LedgerGateway]
    number: int = 0

    def serve(
        self,
        subject: str,
        requests: int,
        at: datetime = MONTH.since + timedelta(days=9, hours=7, minutes=30),
        *,
        by: str | None = "eu",
        counted: bool = True,
    ) -> None:
        """Have requests of a subject; `by` None: no gateway has them, `counted` False: no meter has."""
        made = []
        for _ in range(requests):
            self.number += 1
            made.append(event(f"e{self.number}", subject=subject, time=at.isoformat()))
        if counted:
            send(self.sandbox, *made).raise_for_status()
        if by is not None:
            self.gateways[by].ledger[f"{at:%Y-%m-%dT%H}", "kong.api_request", subject] += requests

    def spend(self, subject: str, amount: int, at: datetime = MONTH.since + timedelta(days=9)) -> None:
        """Have one model call with so many tokens."""
        self.number += 1
        spent = tokens(f"t{self.number}", amount, subject=subject, time=at.isoformat())
        send(self.sandbox, spent).raise_for_status()
        self.gateways["eu"].ledger[f"{at:%Y-%m-%dT%H}", "kong.llm_request", subject] += 1

    @contextmanager
    def closing(self, now: datetime = CLOSABLE, noted: tuple[IgnoredEntry, ...] = ()) -> Iterator[Closing]:
        config = settings.load(self.project.config)
        with opened(config, create=True) as (months, kept):
            yield Closing(config, months, noted or kept, settle=0, now=lambda: now)

    @contextmanager
    def answering(self, otherwise: Callable[[Asked], object | None]) -> Iterator[None]:
        """Put a server before the metering API that answers some requests by itself."""

        def answer(asked: Asked) -> Answer:
            if (body := otherwise(asked)) is not None:
                return Answer(body, headers={"Content-Type": "application/json"})
            got = self.sandbox.request(asked.method, asked.path, params=asked.query)
            return Answer(got.content, got.status_code, {"Content-Type": got.headers["content-type"]})

        text = self.project.config.read_text()
        with serving(answer) as server:
            self.project.config.write_text(text.replace(self.project.metering, server.url))
            for one in self.gateways.values():
                one.endpoint = f"{server.url}/api/v1/events"
            yield

    def call(self, *arguments: str) -> tuple[int, str, str]:
        """Run `syncd close`."""
        result = self.project.call("close", *arguments, "--settle", "0")
        return result.returncode, result.stdout, result.stderr

    def report(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Run `syncd close -o json` and return its status and content."""
        status, out, _ = self.call(*arguments, "-o", "json")
        return status, json.loads(out)["report"]


@contextmanager
def world(folder: Path, sandbox: httpx.Client, *names: str, dialect: str = "openmeter-v1") -> Iterator[World]:
    """Run gateways of these names; the consumers of kong.yml have their customers."""
    folder.mkdir(exist_ok=True)
    project = Project(folder, str(sandbox.base_url).rstrip("/"))
    endpoint = f"{project.metering}/api/v1/events"
    with ExitStack() as stack:
        there = {name: stack.enter_context(gateway(LedgerGateway(endpoint=endpoint))) for name in names}
        urls = configured(**{name: one.url for name, one in there.items()})
        metering = f"metering: {{url: '{project.metering}', attempts: 1, dialect: {dialect}}}\n"
        project.configure(f"daemon: {{state_dir: state}}\n{metering}{urls}")
        assert project.call("apply", "--yes").returncode == 0
        yield World(project, sandbox, there)  # type: ignore[arg-type]
