"""The demo's requests: what a real Kong recorded, multiplied over the consumers of kong.yml.

What the requests must come to in the bill is counted here, from the list of what is driven, and by none
of the code that is being shown.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from random import Random
from typing import Any, Final

import orjson

from tests.demo.gateway import Consumer
from tests.harness.recordings import Recorded, application_request, llm_request, serialized

APPLICATION_SUBJECT: Final = "app:b15e2460-ba40-431d-9df0-4957fcffacda"

_BY_CONSUMER: Final = (
    *("authenticated", "post-body", "authenticated", "gzip", "authenticated", "stream-sse"),
    *("upstream-404", "head", "502-upstream-down", "authenticated"),
)
_BY_NOBODY: Final = ("401-no-key", "404-no-route", "anonymous-consumer", "bad-request-400-invalid-host")


@dataclass
class Expected:
    """What the bill must say of what was driven."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    events: int = 0
    skipped: int = 0

    def bill(self, subject: str, tokens: tuple[int, int] | None = None) -> None:
        """Count a request, with its input and output tokens where it used a model."""
        self.requests[subject] += 1
        self.events += 1
        if tokens:
            self.tokens[subject] += sum(tokens)
            self.events += len(tokens)


def traffic(consumers: list[Consumer], count: int, expected: Expected) -> Iterator[Recorded]:
    """Yield so many requests and note in `expected` what they must come to."""
    random = Random(1)
    kinds = islice(cycle(_mix()), count)
    paying = [consumer for consumer in consumers if consumer.key]
    visitor = next(consumer for consumer in consumers if not consumer.key)
    for recorded in kinds:
        log = orjson.loads(recorded.log)
        log["request"]["id"] = f"{random.getrandbits(128):032x}"
        log["started_at"] = time.time_ns() // 1_000_000
        if recorded is application_request():
            expected.bill(APPLICATION_SUBJECT)
        elif "consumer" not in log:
            expected.skipped += 1
        elif recorded.name == "anonymous-consumer":
            _made_by(log, visitor)
            expected.skipped += 1
        else:
            # Uneven shares: a sum that is right for each by accident would not be for all.
            consumer = random.choices(paying, weights=range(1, len(paying) + 1))[0]
            _made_by(log, consumer)
            usage = log["ai"]["proxy"]["usage"] if recorded is llm_request() else None
            expected.bill(
                consumer.subject, (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
            )
        yield Recorded(recorded.name, orjson.dumps(log), recorded.application)


def _mix() -> list[Recorded]:
    mix = [serialized(name) for name in _BY_CONSUMER * 2]
    mix += [application_request()] * 4 + [llm_request()] * 4
    return mix + [serialized(name) for name in _BY_NOBODY]


def _made_by(log: dict[str, Any], consumer: Consumer) -> None:
    log["consumer"] = {
        "id": consumer.id,
        "username": consumer.username,
        "custom_id": consumer.custom_id,
        "tags": list(consumer.tags),
    }
