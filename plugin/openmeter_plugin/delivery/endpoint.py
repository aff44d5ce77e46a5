"""Endpoint of one queue: posts batches through two breakers, one per endpoint and one per queue.

network, 5xx, 408       the endpoint fails: all of its queues wait, one probes
401, 403, 404, 429 ...  this queue's token, address or quota is at fault: only this queue waits
400, 413, 422           an event is invalid: RejectedError, and `Sender` finds the event
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.store import DeadLetter
from openmeter_plugin.delivery.breaker import Breaker
from openmeter_plugin.delivery.client import EventsClient, RejectedError, UnauthorizedError, UndeliveredError
from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, read_destination

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds

_REQUEST_TIMEOUT: Final = 408
_REREAD_SECONDS: Final = 1.0  # between two reads of a destination's description


class Latency:
    """Histogram of POST durations: cheap to count, and the buckets of many gateways can be summed."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total_seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count), as Prometheus expects them."""
        names = [*map(str, BOUNDS), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


@dataclass(slots=True)
class Breakers:
    """The breakers of all endpoints."""

    by_endpoint: dict[str, Breaker] = field(default_factory=dict)

    def of(self, endpoint: str) -> Breaker:
        """Return the endpoint's breaker."""
        return self.by_endpoint.setdefault(endpoint, Breaker())


class Endpoint:
    """Posts one queue's batches. `address` and `token_file` override the queue's description."""

    def __init__(
        self,
        spool: Path,
        queue: str,
        breakers: Breakers,
        token_file: Path | None = None,
        address: str | None = None,
    ) -> None:
        self._spool = spool
        self._queue = queue
        self._breakers = breakers
        self._token_file = token_file
        self._address = address
        self._queue_breaker = Breaker()
        self._client: EventsClient | None = None
        self._last: Destination | None = None
        self._reread_at = 0.0
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()
        self.retries = 0
        self.latency = Latency()
        """Durations of the successful POSTs."""
        self.waiting: set[asyncio.Task[Any] | None] = set()
        """The tasks that wait for a breaker."""
        self.stopping = False
        """Whether to make no more attempts."""

    @property
    def max_batch_size(self) -> int:
        """Events per POST, by the description read last."""
        destination = self._last or self._destination()
        return destination.max_batch_size if destination else 1

    @property
    def max_coalescing_delay(self) -> float:
        """Seconds to hold back a POST until its batch is full."""
        destination = self._last or self._destination()
        return destination.max_coalescing_delay if destination else 0.0

    @property
    def concurrency(self) -> int:
        """Maximum number of POSTs in flight."""
        destination = self._last or self._destination()
        return destination.concurrency if destination else 1

    @property
    def failing(self) -> int:
        """Consecutive failures of this queue or of its endpoint."""
        shared = self._breakers.of(self._last.endpoint).failures if self._last else 0
        return max(self._queue_breaker.failures, shared)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def attempt(self, events: Sequence[bytes], on_sent: Callable[[], None] | None = None) -> bool:
        """POST once the breakers allow it; returns whether the events are delivered, else try again.

        `on_sent` is called once the POST's body is written. Raises RejectedError.
        """
        if self.stopping:
            raise asyncio.CancelledError
        destination = self._last or self._destination()
        shared = self._breakers.of(destination.endpoint if destination else "")
        task = asyncio.current_task()
        self.waiting.add(task)
        try:
            async with self._queue_breaker.permission(), shared.permission():
                self.waiting.discard(task)
                # Read the description only now: a backlog that has waited needs the newest token.
                return await self._attempt(events, self._destination(), on_sent)
        finally:
            self.waiting.discard(task)

    async def _attempt(
        self,
        events: Sequence[bytes],
        destination: Destination | None,
        on_sent: Callable[[], None] | None,
    ) -> bool:
        shared = self._breakers.of(destination.endpoint if destination else "")
        failures_at_start = {breaker: breaker.failures for breaker in (shared, self._queue_breaker)}
        try:
            await self._post(events, destination, on_sent)
        except UndeliveredError as error:
            self._failed(error, destination, shared, failures_at_start)
            return False
        except RejectedError:
            self._succeeded(shared)  # an answer about the events: the endpoint works
            raise
        self._succeeded(shared)
        return True

    async def _post(
        self,
        events: Sequence[bytes],
        destination: Destination | None,
        on_sent: Callable[[], None] | None,
    ) -> None:
        if destination is None:
            raise UndeliveredError("this queue has no destination: destination.json is missing", 0)
        if self._client is None or self._client.destination != destination:
            await self.close()
            try:
                self._client = EventsClient(destination)
            except (ValueError, OSError) as error:  # the token, the certificates
                raise UndeliveredError(f"{type(error).__name__}: {error}", 0) from None
        started = time.monotonic()
        await self._client.send(events, on_sent)
        self.latency.observe(time.monotonic() - started)

    def _succeeded(self, shared: Breaker) -> None:
        if self._queue_breaker.failures or shared.failures:
            self._log.info("delivery_recovered")
        self._queue_breaker.succeeded()
        shared.succeeded()

    def _failed(
        self,
        error: UndeliveredError,
        destination: Destination | None,
        shared: Breaker,
        failures_at_start: Mapping[Breaker, int],
    ) -> None:
        self.retries += 1
        endpoint_fails = error.status is None or error.status >= 500 or error.status == _REQUEST_TIMEOUT
        breaker = shared if endpoint_fails else self._queue_breaker
        if error.status and not endpoint_fails:
            shared.succeeded()  # the endpoint answers, so it is up for all other queues
        initial = destination.initial_retry_delay if destination else 1.0
        maximum = destination.max_retry_delay if destination else 60.0
        pause = breaker.failed(initial, maximum, error.retry_after, failures_at_start[breaker])
        if not self._failure_limit.passes():
            return
        facts: dict[str, Any] = {
            "reason": str(error)[:300],
            "failures": breaker.failures,
            "next_try_seconds": round(pause, 2),
            "consequence": "the events wait in the spool",
        }
        if isinstance(error, UnauthorizedError):
            self._log.critical("token_refused", **facts, remedy="configure a token that may ingest events")
        else:
            self._log.error("delivery_failed", **facts)

    def _destination(self) -> Destination | None:
        """Return the destination by its current description, so that a new token reaches a waiting backlog.

        While POSTs succeed, the description is read once a second.
        """
        now = time.monotonic()
        if self._last is not None and now < self._reread_at and not self.failing:
            return self._last
        self._reread_at = now + _REREAD_SECONDS
        try:
            described = self._described()
            token = self._configured_token()
        except (OSError, ValueError) as error:
            if self._failure_limit.passes():
                self._log.error("destination_unreadable", reason=f"{type(error).__name__}: {error}")
            return self._last
        if self._address is not None:
            described = replace(described or Destination(self._queue, ""), endpoint=self._address)
        if described is not None and token is not None:
            described = replace(described, token=token)
        self._last = described
        return described

    def _described(self) -> Destination | None:
        try:
            return read_destination(self._spool, self._queue)
        except ValueError:
            if self._address is None:
                raise
            return None  # the configured address is used instead

    def _configured_token(self) -> str | None:
        if self._token_file is not None:
            return self._token_file.read_text().strip()
        return os.environ.get(TOKEN_VARIABLE) or None


class Sender:
    """Sends one queue's events until each is delivered or a dead letter."""

    def __init__(self, queue: str, endpoint: Endpoint, max_age: timedelta | None = None) -> None:
        self._endpoint = endpoint
        self._max_age = max_age
        self._log = get_logger().bind(queue=queue)

    async def send(
        self, events: Sequence[bytes], *, expiring: bool = False, on_sent: Callable[[], None] | None = None
    ) -> list[DeadLetter]:
        """Send events until all are delivered, except those refused, which are returned as dead letters.

        A batch is not atomic: events before an invalid one are stored although the answer is an error.
        Sending them again is harmless, because the metering API knows the ids. With `expiring`, events that
        have grown too old become dead letters too. `on_sent` is called once a POST's body is written.
        """
        dead: list[DeadLetter] = []
        while True:
            if expiring:
                events, expired = self._split_expired(events)
                dead += expired
            if not events:
                return dead
            try:
                if await self._endpoint.attempt(events, on_sent):
                    return dead
            except RejectedError as rejection:
                single = _split_events(events)
                if len(single) == 1:
                    self._log.error("dead_letter", status=rejection.status, answer=str(rejection)[:300])
                    return [*dead, DeadLetter(single[0], rejection.status, str(rejection))]
                middle = len(single) // 2
                dead += await self.send(single[:middle], expiring=expiring)
                events = single[middle:]

    def _split_expired(self, events: Sequence[bytes]) -> tuple[Sequence[bytes], list[DeadLetter]]:
        """Split off the events that are older than the age limit, if there is one."""
        if self._max_age is None or not events:
            return events, []
        oldest = (datetime.now(UTC) - self._max_age).strftime("%Y-%m-%dT%H:%M:%S")
        parsed = _parsed(events)
        if all(str(event.get("time")) >= oldest for event in parsed):
            return events, []
        answer = f"not delivered within {self._max_age}, the configured age limit"
        young = [orjson.dumps(event) for event in parsed if str(event.get("time")) >= oldest]
        old = [orjson.dumps(event) for event in parsed if str(event.get("time")) < oldest]
        return young, [DeadLetter(event, None, answer) for event in old]


def _parsed(events: Sequence[bytes]) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(events) + b"]")
    return parsed


def _split_events(events: Sequence[bytes]) -> list[bytes]:
    """Return the events one by one; in the spool, a request's events are joined."""
    return [orjson.dumps(event) for event in _parsed(events)]
