"""The recordings of a real Kong 3.9.1, as the tests, the demo and the benchmarks use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

WIRE: Final = Path(__file__).parents[1] / "data" / "kong-wire"

SECRETS: Final = (
    *("alice-key", "bob-key", "wrong-key"),
    *("a=1&a=2", "b=x%20y", "x y", "flag&b"),
    *("shared-secret-of-the-recording", "om-token-from-vault"),
)
"""Secrets in the recordings, which must never be in an event, in the spool's records or in a log line."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request that Kong served: its serialized log and its application context, encoded as Kong sent it."""

    name: str
    log: bytes
    application: bytes = b"\x08\x01"  # google.protobuf.Value null, as Kong writes it
    captures: bytes | None = b""  # UriCapturesResult; None if Kong fails over the query

    @property
    def parsed(self) -> dict[str, Any]:
        """The log as JSON."""
        result: dict[str, Any] = json.loads(self.log)
        return result


@cache
def serialized(name: str) -> Recorded:
    """Return the request of serialize-<name>.json."""
    return Recorded(name, (WIRE / f"serialize-{name}.json").read_bytes().strip())


def all_serialized() -> list[Recorded]:
    """Return every serialize-*.json."""
    return [serialized(path.stem.removeprefix("serialize-")) for path in sorted(WIRE.glob("serialize-*"))]


def frames() -> Iterator[dict[str, Any]]:
    """Yield each line of protobuf-frames.jsonl, `frame` decoded."""
    for line in (WIRE / "protobuf-frames.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "frame_hex" in entry:
            entry["frame"] = bytes.fromhex(entry["frame_hex"])
        yield entry


@cache
def protobuf_requests() -> tuple[Recorded, ...]:
    """Return the requests that Kong handed over in protobuf-frames.jsonl, in their order."""
    requests: list[Recorded] = []
    application = b""
    for entry in frames():
        frame = entry.get("frame", b"")
        if entry.get("direction") != "kong->pluginserver":
            continue
        start = frame.find(b'{"')
        if frame[:1] == b"\x0a" and start in (2, 3):
            requests.append(Recorded(f"frame {len(requests)}", frame[start:], application))
        elif frame[:1] in (b"\x08", b"\x2a"):
            application = frame
    return tuple(requests)


@cache
def application_context() -> bytes:
    """Return the Dev Portal application's context as Kong encoded it."""
    return next(r.application for r in protobuf_requests() if r.application[:1] == b"\x2a")


URI_CAPTURES: Final = bytes.fromhex(
    "120d0a04636974791205706172697312100a0673747265657412067269766f6c690a0570617269730a067269766f6c69"
)
"""The answer of Kong 3.9.1 for /cities/paris/rivoli on ~/cities/(?<city>[^/]+)(?:/(?<street>[a-z]+))?"""


@cache
def llm_request() -> Recorded:
    """Return the request with an `ai` block."""
    return next(r for r in protobuf_requests() if "ai" in r.parsed)


@cache
def application_request() -> Recorded:
    """Return the request that a Dev Portal application made."""
    return next(r for r in protobuf_requests() if r.application[:1] == b"\x2a")
