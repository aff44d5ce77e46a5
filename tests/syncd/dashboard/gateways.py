"""A fake of the plugin's API on a gateway, limited to what the dashboard reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openmeter_plugin.books.refusals import refusal_group
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
    event: dict[str, Any] = field(default_factory=lambda: {"specversion": "1.0"})
    """The event of each dead letter."""
    replay: dict[str, Any] | None = None
    """The latest replay, and what becomes of one that is asked for; without one, that fails."""
    replays: list[dict[str, Any]] = field(default_factory=list)
    """The replays that were asked for."""
    kept: list[dict[str, Any]] = field(default_factory=list)
    """The requests in quarantine."""
    gate: dict[str, Any] | None = None
    """The answer to GET /v1/gate; without one, it runs without a gate."""
    overrides: list[dict[str, Any]] = field(default_factory=list)
    """Changes of the gate's overrides that were asked for."""
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
        if asked.path == "/v1/gate/overrides":
            return self.override_answer(asked)
        if asked.path.startswith(("/v1/dead-letters", "/v1/replays", "/v1/quarantine")):
            return self.kept_answer(asked)
        return Answer(status=404)

    def override_answer(self, asked: Asked) -> Answer:
        """Set or end an override, if there is a gate."""
        if self.gate is None:
            return Answer({"detail": "this plugin server runs without a gate: see serve --gate"}, 404)
        if asked.method == "DELETE":
            self.overrides.append({"ended": asked.query["subject"]})
            return Answer(status=204)
        assert isinstance(asked.body, dict)
        self.overrides.append(asked.body)
        return Answer({"subject": asked.body["subject"], "until": 1.0}, 201)

    def kept_answer(self, asked: Asked) -> Answer:
        """What is kept for people: dead letters, replays, the quarantine."""
        match asked.path.split("/")[2:]:
            case ["dead-letters", "groups"]:
                return Answer(self.groups())
            case ["dead-letters", "replay"]:
                assert isinstance(asked.body, dict)
                self.replays.append(asked.body)
                return Answer(self.replay, 202) if self.replay else Answer(status=500)
            case ["dead-letters", number]:
                found = [letter for letter in self.dead if letter["id"] == int(number)]
                return Answer(found[0] | {"event": self.event}) if found else Answer(status=404)
            case ["dead-letters"]:
                group = asked.query.get("group")
                found = [letter for letter in self.dead if group in (None, letter["group"])]
                return Answer(paged("dead_letters", found, asked))
            case ["replays"]:
                return Answer({"replays": [self.replay] if self.replay else []})
            case ["replays", _]:
                return Answer(self.replay) if self.replay else Answer(status=404)
            case ["quarantine", "groups"]:
                return Answer(self.quarantine_groups())
            case _:
                found = [one for one in self.kept if one["reason"] == asked.query["reason"]]
                return Answer(paged("requests", found, asked))

    def groups(self) -> dict[str, Any]:
        """GET /v1/dead-letters/groups."""
        groups: dict[str, dict[str, Any]] = {}
        for letter in self.dead:
            fields = ("destination", "status", "title", "detail")
            new = {name: letter[name] for name in fields} | {"id": letter["group"], "dead_letters": 0}
            new |= {"to_be_replayed": 0, "first_died_at": letter["died_at"]}
            group = groups.setdefault(letter["group"], new)
            group["dead_letters"] += 1
            group["to_be_replayed"] += letter["to_be_replayed"]
            group |= {"last_died_at": letter["died_at"], "newest_id": letter["id"]}
        found = sorted(groups.values(), key=lambda group: -group["dead_letters"])
        return {
            "groups": found,
            "further_groups": 0,
            "dead_letters": len(self.dead),
            "to_be_replayed": sum(group["to_be_replayed"] for group in found),
            "newest_id": max((letter["id"] for letter in self.dead), default=0),
        }

    def quarantine_groups(self) -> dict[str, Any]:
        """GET /v1/quarantine/groups."""
        counts = Counter(one["reason"] for one in self.kept)
        at = "2026-11-22T06:00:00Z"
        groups = [
            {"reason": reason, "requests": number, "first_at": at, "last_at": at}
            for reason, number in counts.most_common()
        ]
        return {"groups": groups, "further_groups": 0, "requests": len(self.kept)}

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
        "title": "",
        "detail": answer,
        "died_at": "2026-11-22T06:00:00Z",
        "to_be_replayed": False,
    }
    made |= fields
    return {"group": refusal_group(made["destination"], made["status"], made["answer"])} | made


def quarantined(number: int, reason: str = "no_consumer", **log: Any) -> dict[str, Any]:
    kept = {"request": {"id": f"r{number}", "method": "GET"}, "started_at": 1_763_790_000_000} | log
    return {
        "id": number,
        "reason": reason,
        "at": "2026-11-22T06:00:00Z",
        "destination": None,
        "log": kept,
        "application": None,
        "attributes": {},
    }


def replay(number: int = 7, marked: int = 2, **fields: Any) -> dict[str, Any]:
    made = {"id": number, "marked": marked, "delivered": 0, "refused": 0, "waiting": marked}
    return made | {"asked_at": "2026-11-22T06:00:00Z"} | fields


def paged(name: str, found: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """The page of a list that a request asks for."""
    after, limit = int(asked.query["after"]), int(asked.query["limit"])
    rest = [one for one in found if one["id"] > after]
    page = rest[:limit]
    return {name: page, "next": page[-1]["id"] if len(rest) > limit else None}


@contextmanager
def gateway(fake: FakeGateway) -> Iterator[FakeGateway]:
    with serving(fake.answer) as server:
        fake.url = server.url
        yield fake


def configured(**urls: str) -> str:
    """The setting `gateways`."""
    lines = [f"- {{name: {name}, url: '{url}', token: {GATEWAY_TOKEN}}}\n" for name, url in urls.items()]
    return "gateways:\n" + "".join(lines)
