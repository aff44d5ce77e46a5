"""A fake of the plugin's API on a gateway, limited to what the dashboard reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.syncd.servers import Answer, Asked, serving

GATEWAY_TOKEN = "token-of-the-gateway-s-api"


@dataclass
class FakeGateway:
    """The gateway's state; `dead` are its dead letters."""

    ready: bool = True
    problems: list[str] = field(default_factory=list)
    delivery_running: bool = True
    backlog: int = 0
    oldest_seconds: float | None = None
    lost: dict[str, int] = field(default_factory=dict)
    ai_usage_gaps: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0
    dead: list[dict[str, Any]] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    """The answer to GET /v1/gate; without one, it runs without a gate."""
    url: str = ""

    def answer(self, asked: Asked) -> Answer:
        if asked.path == "/readyz":
            return Answer({"ready": self.ready, "problems": self.problems}, 200 if self.ready else 503)
        if asked.headers.get("authorization") != f"Bearer {GATEWAY_TOKEN}":
            return Answer({"detail": "send this API's token"}, 401)
        if asked.path == "/v1/spool":
            return Answer(self.spool())
        if asked.path == "/v1/gate":
            without = {"detail": "this plugin server runs without a gate: see serve --gate"}
            return Answer(without, 404) if self.gate is None else Answer(self.gate)
        if asked.path == "/v1/dead-letters":
            after, limit = int(asked.query["after"]), int(asked.query["limit"])
            found = [letter for letter in self.dead if letter["id"] > after]
            page = found[:limit]
            return Answer({"dead_letters": page, "next": page[-1]["id"] if len(found) > limit else None})
        return Answer(status=404)

    def spool(self) -> dict[str, Any]:
        names = (
            "requests",
            "metered",
            "quarantined",
            "resent",
            "events",
            "delivered",
            "waiting",
            "redelivered",
        )
        books = dict.fromkeys(names, 0) | {"skipped": {}, "lost": self.lost, "damaged_bytes": 0}
        books |= {"dead_lettered": len(self.dead), "unreadable_segments": 0}
        books |= {"ai_usage_gaps": self.ai_usage_gaps}
        oldest = None
        if self.oldest_seconds is not None:
            oldest = {"time": "2026-11-22T07:00:00.000Z", "age_seconds": self.oldest_seconds}
        part = {
            "books": books,
            "not_accounted": {"requests": 0, "events": 0, "lost": 0},
            "backlog": self.backlog,
            "oldest_waiting": oldest,
            "segments": 1,
            "bytes": 4096,
        }
        named = {"id": "aaaabbbbccccdddd", "endpoint": "https://openmeter.example.com/api/v1/events"}
        return {
            "delivery_running": self.delivery_running,
            "total": part,
            "destinations": [part | named],
            "dead_letters": len(self.dead),
            "quarantined": self.quarantined,
        }


def dead_letter(number: int, answer: str = "bad event", **fields: Any) -> dict[str, Any]:
    made = {
        "id": number,
        "destination": "aaaabbbbccccdddd",
        "event_id": f"event-{number:06}",
        "type": "kong.api_request",
        "subject": "consumer:alice",
        "time": "2026-11-20T05:49:03.779Z",
        "status": 400,
        "answer": answer,
        "died_at": "2026-11-22T06:00:00Z",
        "to_be_replayed": False,
    }
    return made | fields


@contextmanager
def gateway(fake: FakeGateway) -> Iterator[FakeGateway]:
    with serving(fake.answer) as server:
        fake.url = server.url
        yield fake


def configured(**urls: str) -> str:
    """The setting `gateways`."""
    lines = [f"- {{name: {name}, url: '{url}', token: {GATEWAY_TOKEN}}}\n" for name, url in urls.items()]
    return "gateways:\n" + "".join(lines)
