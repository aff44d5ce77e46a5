"""Kong's Admin API and a metering API (v1) in one process that costs next to nothing.

The sandbox spends more on a request than a client does, and would hide what is measured. Here lists are
made before the first request, and an answer is a look into a dictionary. Prints its URL; `GET /created`
tells how many different customers were made, `POST /forget` forgets them.

    python -m tests.bench.syncd_apis CONSUMERS [--synced] [--subjects]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import uvloop

PAGE = 1000
SETTINGS = """
sources: [{{type: kong-admin, url: '{url}/kong'}}]
metering: {{url: '{url}', concurrency: {concurrency}}}
"""
_CREATED_AT = "2026-01-01T00:00:00.000Z"
_NAMESPACE = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


def consumer_id(number: int) -> str:
    """Return the id of a consumer, as long and as random as Kong's."""
    return str(uuid.uuid5(_NAMESPACE, str(number)))


def consumer(number: int) -> dict[str, object]:
    """Return a consumer as Kong lists it."""
    return {
        "custom_id": f"crm-{number}",
        "updated_at": 1795326486,
        "created_at": 1795326486,
        "tags": ["gold", "team-a"],
        "id": consumer_id(number),
        "username": f"user-{number}",
    }


def body(number: int) -> dict[str, object]:
    """Return what a customer is created with: the very fields that syncd sends."""
    identity = consumer_id(number)
    return {
        "key": f"consumer-{identity}",
        "name": f"user-{number}",
        "metadata": {"managed-by": "kong-openmeter", "sync-owner": "default", "source-id": identity},
        "usageAttribution": {"subjectKeys": [f"consumer:{identity}"]},
    }


def customer(number: int) -> dict[str, object]:
    """Return a customer as the metering API lists it."""
    times = {"createdAt": _CREATED_AT, "updatedAt": _CREATED_AT}
    return {"id": f"01KAH{number:021d}", **times, **body(number), "annotations": {}, "subscriptions": []}


def subject(number: int) -> dict[str, object]:
    """Return a subject entity as the metering API lists it."""
    made = body(number)
    times = {"createdAt": _CREATED_AT, "updatedAt": _CREATED_AT}
    name, metadata = made["name"], made["metadata"]
    return {
        "id": f"01KAS{number:021d}",
        **times,
        "key": made["key"],
        "displayName": name,
        "metadata": metadata,
    }


def usage(number: int) -> dict[str, object]:
    """Return a row of usage."""
    key = f"consumer:{consumer_id(number)}"
    window = {"windowStart": "2026-10-22T00:00:00Z", "windowEnd": "2026-11-22T00:00:00Z"}
    return {"value": number % 1000 + 1, **window, "subject": key, "groupBy": {"subject": key}}


def lists(consumers: int, *, synced: bool, subjects: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each answer to GET with the key that `asked` makes of the request."""
    yield "/kong/status", lambda: {"database": {"reachable": True}}
    yield "/kong/plugins", lambda: {"data": [], "next": None}
    # Kong lists by id, and customers are in the order in which a first sync made them: by key.
    everybody = sorted(range(consumers), key=consumer_id)
    for start in range(0, max(consumers, 1), PAGE):
        numbers, stop = everybody[start : start + PAGE], start + PAGE
        page = (
            {"next": f"/consumers?offset={stop}", "offset": str(stop)} if stop < consumers else {"next": None}
        )
        key = f"/kong/consumers {start or ''}".rstrip()
        yield key, lambda numbers=numbers, page=page: {"data": [consumer(n) for n in numbers], **page}  # type: ignore[misc]
    there = everybody if synced else []
    for number in range(1, max(-(-len(there) // PAGE), 1) + 1):
        items = there[(number - 1) * PAGE : number * PAGE]
        key = f"/api/v1/customers {number} {PAGE}"
        yield key, lambda items=items, number=number: _page([customer(n) for n in items], len(there), number)  # type: ignore[misc]
    if there:
        yield (
            f"/api/v1/customers {len(there)} 1",
            lambda: _page([customer(there[-1])], len(there), len(there)),
        )
    if subjects:
        yield "/api/v1/subjects", lambda: [subject(n) for n in there]
    yield "/api/v1/meters/kong_api_requests/query", lambda: {"data": [usage(n) for n in there]}
    yield "/api/v1/meters/kong_llm_tokens/query", lambda: {"data": []}


def _page(items: list[dict[str, object]], total: int, number: int) -> dict[str, object]:
    return {"items": items, "totalCount": total, "page": number, "pageSize": PAGE}


def asked(target: str) -> str:
    """Return path and paging of a request, and nothing else of it."""
    parts = urlsplit(target)
    query = parse_qs(parts.query)
    paging = [query[name][0] for name in ("offset", "page", "pageSize") if name in query]
    return " ".join([parts.path, *paging])


class Apis(asyncio.Protocol):
    """One connection."""

    def __init__(self, answers: dict[str, bytes], created: set[bytes]) -> None:
        self._answers = answers
        self._created = created
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer all requests that are complete."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            stop = end + 4 + _content_length(head)
            if len(self._buffer) < stop:
                return
            content, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            self._transport.write(self._answer(head, content))

    def _answer(self, head: bytes, content: bytes) -> bytes:
        method, target, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        if method == b"POST" and target == b"/api/v1/customers":
            self._created.add(content)
            return _http(b"201 Created", content[:-1] + b',"id":"01KAH5W8Z0Q6V3N2B1C4D7E9F0"}')
        if method == b"POST" and target == b"/api/v1/subjects":
            return _http(b"200 OK", content)
        if target == b"/forget":
            self._created.clear()
            return _http(b"204 No Content", b"")
        if target == b"/created":
            return _http(b"200 OK", b"%d" % len(self._created))
        found = self._answers.get(asked(target.decode()))
        return found or _http(b"404 Not Found", b'{"title":"Not Found"}')


def _http(status: bytes, content: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(content)) + content


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else 0


async def _serve(answers: dict[str, bytes]) -> None:
    created: set[bytes] = set()
    server = await asyncio.get_running_loop().create_server(lambda: Apis(answers, created), "127.0.0.1", 0)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    options = argparse.ArgumentParser(prog="syncd_apis")
    options.add_argument("consumers", type=int)
    options.add_argument("--synced", action="store_true", help="each has its customer already")
    options.add_argument("--subjects", action="store_true", help="the metering API has subject entities")
    chosen = options.parse_args()
    made = lists(chosen.consumers, synced=chosen.synced, subjects=chosen.subjects)
    answers = {
        key: _http(b"200 OK", json.dumps(make(), separators=(",", ":")).encode()) for key, make in made
    }
    uvloop.run(_serve(answers))


if __name__ == "__main__":
    main()
