"""A generated world: Kong with 30,000 consumers, a metering API (v1) with 10,000 customers and 90 days.

No event is stored: each value is computed from the subject and the day, so a query costs what its answer
costs. Prints its URL; `GET /counts` tells how many requests of each kind came.

    python -m tests.bench.world [--customers 10000] [--subjects 30000] [--days 90]
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from urllib.parse import parse_qs, urlsplit

import orjson
import uvloop

UNBILLED = 300
"""Subjects with usage that are on no customer."""
_CLASSES = 50
"""Of so many subjects, one grows, one shrinks, one fell silent and one is new; the others are steady."""
_ROUTES, _MODELS, _TYPES = 20, ("gpt-4o", "claude-sonnet", "mistral-small"), ("input", "output")
_NAMESPACE = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
_CREATED_AT = "2026-01-01T00:00:00.000Z"

Row = dict[str, object]


@dataclass
class World:
    """The values of everything; `today` is the last day with usage."""

    customers: int
    subjects: int
    days: int
    today: date = field(default_factory=lambda: datetime.now(UTC).date())

    @cached_property
    def consumer_ids(self) -> list[str]:
        """The ids of the consumers, as long and as random as Kong's."""
        return [str(uuid.uuid5(_NAMESPACE, str(number))) for number in range(self.subjects)]

    @cached_property
    def keys(self) -> list[str]:
        """The subjects with usage; the last ones are on no customer."""
        return [f"consumer:{one}" for one in self.consumer_ids] + [f"stray-{n}" for n in range(UNBILLED)]

    @cached_property
    def bases(self) -> list[int]:
        """The usual requests of a day by subject: few have many, most have few."""
        total = len(self.keys)
        return [1 + 40_000 // (1 + number * 2_654_435_761 % total) for number in range(total)]

    def factor(self, kind: int, day: date) -> int:
        """How many times the usual a subject of a kind uses on a day; no usage outside the 90 days."""
        age = (self.today - day).days
        if not 0 <= age < self.days:
            return 0
        usual = 4 if day.weekday() >= 5 else 10
        match kind:
            case 0:
                return usual + (self.days - age) // 3
            case 1:
                return usual + age // 3
            case 2:
                return usual if age >= 31 else 0
            case 3:
                return usual if age < 20 else 0
            case _:
                return usual

    def requests_on(self, number: int, day: date) -> int:
        """The requests of a subject on a day."""
        return self.bases[number] * self.factor(number % _CLASSES, day)

    @cached_property
    def weights(self) -> list[int]:
        """The sum of the usual requests of all subjects of each kind."""
        found = [0] * _CLASSES
        for number, base in enumerate(self.bases):
            found[number % _CLASSES] += base
        return found

    def total(self, meter: str, day: date) -> int:
        """The value of a meter on a day."""
        requests = sum(weight * self.factor(kind, day) for kind, weight in enumerate(self.weights))
        return requests * (1 if meter == "kong_api_requests" else 130 * len(_TYPES))

    def rows(self, meter: str, day: date, names: list[str]) -> Iterator[tuple[str, dict[str, str], int]]:
        """The values of a meter on a day by subject and dimensions."""
        for number, key in enumerate(self.keys):
            value = self.requests_on(number, day)
            if not value:
                continue
            if meter == "kong_api_requests":
                # Two routes for each subject; which they are depends on it.
                small = value // 3
                parts = ((number % _ROUTES, value - small), ((number * 7 + 3) % _ROUTES, small))
                listed = [({"route_name": f"route-{route}"}, part) for route, part in parts if part]
            else:
                model = _MODELS[number % len(_MODELS)]
                listed = [({"model": model, "type": kind}, value * 130) for kind in _TYPES]
            if names:
                for labels, part in listed:
                    yield key, {name: labels.get(name, "") for name in names}, part
            else:
                yield key, {}, sum(part for _, part in listed)


class Api:
    """Answers requests as Kong's Admin API and OpenMeter's v1 do."""

    def __init__(self, world: World, url: str) -> None:
        self.world = world
        self.url = url
        self.counts: Counter[str] = Counter()

    def answer(self, method: str, target: str) -> tuple[int, object]:
        """Return the status and the body."""
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        path = parts.path
        if path == "/counts":
            return 200, dict(self.counts)
        kind = "query" if path.endswith("/query") else path.rpartition("/")[2]
        if kind == "query":
            kind = "totals" if "windowSize" in query else "day"
        self.counts[f"{method} {kind}"] += 1
        match path:
            case "/kong/consumers":
                return 200, self._consumers(query)
            case "/kong/status":
                return 200, {"database": {"reachable": True}}
            case "/kong/plugins":
                return 200, {"data": [], "next": None}
            case "/api/v1/customers":
                return 200, self._customers(query)
            case "/api/v1/meters":
                return 200, [
                    _meter("kong_api_requests", "COUNT", "kong.api_request", ["route_name"]),
                    _meter("kong_llm_tokens", "SUM", "kong.llm_request", ["model", "type"]),
                ]
            case _ if path.endswith("/query"):
                return 200, self._usage(path.split("/")[-2], query)
        return 404, {"status": 404, "title": "Not Found", "detail": "there is nothing"}

    def _consumers(self, query: dict[str, list[str]]) -> Row:
        start, size = int(query.get("offset", ["0"])[0]), int(query.get("size", ["1000"])[0])
        end = min(start + size, self.world.subjects)
        following = f"/consumers?offset={end}&size={size}" if end < self.world.subjects else None
        found: Row = {"data": [self._consumer(number) for number in range(start, end)], "next": following}
        return found | ({"offset": str(end)} if following else {})

    def _consumer(self, number: int) -> Row:
        tags = ["gold", f"customer:{self._customer_key(number % self.world.customers)}"]
        times = {"created_at": 1795326486, "updated_at": 1795326486}
        names = {"username": f"user-{number}", "custom_id": f"crm-{number}"}
        return {**times, **names, "id": self.world.consumer_ids[number], "tags": tags}

    def _customer_key(self, number: int) -> str:
        return f"acme{number:05}"

    def _customers(self, query: dict[str, list[str]]) -> Row:
        page, size = int(query.get("page", ["1"])[0]), int(query.get("pageSize", ["100"])[0])
        start, world = (page - 1) * size, self.world
        items = [self._customer(number) for number in range(start, min(start + size, world.customers))]
        return {"items": items, "page": page, "pageSize": size, "totalCount": world.customers}

    def _customer(self, number: int) -> Row:
        world, key = self.world, self._customer_key(number)
        return {
            "id": f"01KAH{number:021d}",
            "createdAt": _CREATED_AT,
            "updatedAt": _CREATED_AT,
            "key": key,
            "name": f"Customer {number} GmbH",
            "metadata": {"managed-by": "kong-openmeter", "sync-owner": "default", "source-id": key},
            "usageAttribution": {
                "subjectKeys": sorted(world.keys[number : world.subjects : world.customers])
            },
            "annotations": {},
            "subscriptions": [],
        }

    def _usage(self, meter: str, query: dict[str, list[str]]) -> Row:
        first = self.world.today - timedelta(days=self.world.days - 1)
        since = max(_day(query.get("from"), first), first)
        end = self.world.today + timedelta(days=1)
        until = min(_day(query.get("to"), end), end)
        days = [since + timedelta(days=count) for count in range(max((until - since).days, 0))]
        if "windowSize" in query:
            return {"data": [_row(day, 1, self.world.total(meter, day), None, {}) for day in days]}
        names = [name for name in query.get("groupBy", []) if name not in ("subject", "customer_id")]
        if len(days) == 1:
            listed = self.world.rows(meter, days[0], names)
            return {"data": [_row(days[0], 1, value, key, labels) for key, labels, value in listed]}
        factors = [sum(self.world.factor(kind, day) for day in days) for kind in range(_CLASSES)]
        scale = 1 if meter == "kong_api_requests" else 130 * len(_TYPES)
        sums = (
            (key, base * factors[number % _CLASSES] * scale)
            for number, (key, base) in enumerate(zip(self.world.keys, self.world.bases, strict=True))
        )
        return {"data": [_row(since, len(days), value, key, {}) for key, value in sums if value]}


def _meter(slug: str, aggregation: str, event_type: str, dimensions: list[str]) -> Row:
    names = {name: f"$.{name}" for name in dimensions}
    made: Row = {"id": f"01KAM{len(slug):021d}", "slug": slug, "name": slug, "aggregation": aggregation}
    return {**made, "eventType": event_type, "groupBy": names} | (
        {"valueProperty": "$.tokens"} if aggregation == "SUM" else {}
    )


def _row(day: date, days: int, value: int, subject: str | None, labels: dict[str, str]) -> Row:
    start, end = f"{day}T00:00:00Z", f"{day + timedelta(days=days)}T00:00:00Z"
    return {"value": value, "windowStart": start, "windowEnd": end, "subject": subject, "groupBy": labels}


def _day(values: list[str] | None, default: date) -> date:
    return date.fromisoformat(values[0][:10]) if values else default


async def serve(world: World) -> None:
    """Serve on a free port until cancelled."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                lengths = [
                    line[15:] for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"
                ]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                status, body = api.answer(method, target)
                content = orjson.dumps(body)
                writer.write(
                    f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(content)}\r\n\r\n".encode()
                )
                writer.write(content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    api = Api(world, url)
    print(url, flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Run the server of the options."""
    options = argparse.ArgumentParser(prog="python -m tests.bench.world")
    options.add_argument("--customers", type=int, default=10_000)
    options.add_argument("--subjects", type=int, default=30_000)
    options.add_argument("--days", type=int, default=90)
    arguments = options.parse_args()
    uvloop.run(serve(World(arguments.customers, arguments.subjects, arguments.days)))


if __name__ == "__main__":
    main()
