"""A queue's way to its destination: one batch in, sent again until there is an answer to go by.

network, 5xx, 408       the endpoint is at fault: every queue that goes there waits, one tries
401, 403, 404, 429 ...  this queue's token, address or quota is: only this queue waits
400, 413, 422           the events are: RejectedError, for the caller to find the one
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

# MERGED: How long POSTs take, in buckets: cheap to count, and the buckets of many gateways can be added up.

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


class Latency:
    """Durations of POSTs."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total_seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, how many took at most so long), as Prometheus wants them."""
        names = [*map(str, BOUNDS), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


_REQUEST_TIMEOUT: Final = 408
_REREAD_SECONDS: Final = 1.0  # seconds


@dataclass(slots=True)
class Breakers:
    """The breakers of all endpoints."""

    by_endpoint: dict[str, Breaker] = field(default_factory=dict)

    def of(self, endpoint: str) -> Breaker:
        """Return the endpoint's breaker."""
        return self.by_endpoint.setdefault(endpoint, Breaker())


class Endpoint:
    """Sends one queue's batches."""

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
        self._look_at = 0.0
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()
        self.retries = 0
        self.latency = Latency()
        """Of the POSTs that were taken."""
        self.waiting: set[asyncio.Task[Any] | None] = set()
        """Those that wait until another attempt makes sense."""
        self.stopping = False
        """Whether no other attempt is to be made."""

    @property
    def max_batch_size(self) -> int:
        """Events per POST, as it was described when last looked at."""
        destination = self._last or self._destination()
        return destination.max_batch_size if destination else 1

    @property
    def max_coalescing_delay(self) -> float:
        """Seconds that a POST is held back for more to come."""
        destination = self._last or self._destination()
        return destination.max_coalescing_delay if destination else 0.0

    @property
    def concurrency(self) -> int:
        """POSTs that may be under way at once."""
        destination = self._last or self._destination()
        return destination.concurrency if destination else 1

    @property
    def failing(self) -> int:
        """Failures in a row, of this queue or of its endpoint."""
        shared = self._breakers.of(self._last.endpoint).failures if self._last else 0
        return max(self._queue_breaker.failures, shared)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def attempt(self, events: Sequence[bytes], on_sent: Callable[[], None] | None = None) -> bool:
        """Send once it makes sense; returns whether they are taken, else it is for another attempt.

        `on_sent` is called when the POST's body is written. Raises RejectedError.
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
                # Looked at only now: a new token must reach a backlog that has waited.
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
        known = {breaker: breaker.failures for breaker in (shared, self._queue_breaker)}
        try:
            await self._post(events, destination, on_sent)
        except UndeliveredError as error:
            self._failed(error, destination, shared, known)
            return False
        except RejectedError:
            self._succeeded(shared)  # an answer about the events: the way there is fine
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
            raise UndeliveredError("nobody has said where this queue goes: destination.json is missing", 0)
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
            self._log.info("delivery_works_again")
        self._queue_breaker.succeeded()
        shared.succeeded()

    def _failed(
        self,
        error: UndeliveredError,
        destination: Destination | None,
        shared: Breaker,
        known: Mapping[Breaker, int],
    ) -> None:
        self.retries += 1
        endpoint_fails = error.status is None or error.status >= 500 or error.status == _REQUEST_TIMEOUT
        breaker = shared if endpoint_fails else self._queue_breaker
        if error.status and not endpoint_fails:
            shared.succeeded()  # it answers: what it has against us is no other queue's business
        initial = destination.initial_retry_delay if destination else 1.0
        longest = destination.max_retry_delay if destination else 60.0
        pause = breaker.failed(initial, longest, error.retry_after, known[breaker])
        if not self._failure_limit.passes():
            return
        facts: dict[str, Any] = {
            "reason": str(error)[:300],
            "failures": breaker.failures,
            "next_try_seconds": round(pause, 2),
            "consequence": "the events wait in the spool",
        }
        if isinstance(error, UnauthorizedError):
            self._log.critical("token_refused", **facts, remedy="give the plugin a token that may ingest")
        else:
            self._log.error("delivery_fails", **facts)

    def _destination(self) -> Destination | None:
        """Return the destination as it is described now: a new token must reach a waiting backlog.

        While all goes well it is looked at once a second.
        """
        now = time.monotonic()
        if self._last is not None and now < self._look_at and not self.failing:
            return self._last
        self._look_at = now + _REREAD_SECONDS
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
            return None  # where it goes is said by somebody else

    def _configured_token(self) -> str | None:
        if self._token_file is not None:
            return self._token_file.read_text().strip()
        return os.environ.get(TOKEN_VARIABLE) or None


# MERGED: Having events taken: sent until the metering API has them, but for those that it will never take.


class Sender:
    """Sends one queue's events through its endpoint."""

    def __init__(self, queue: str, endpoint: Endpoint, max_age: timedelta | None = None) -> None:
        self._endpoint = endpoint
        self._max_age = max_age
        self._log = get_logger().bind(queue=queue)

    async def send(
        self, events: Sequence[bytes], *, expiring: bool = False, on_sent: Callable[[], None] | None = None
    ) -> list[DeadLetter]:
        """Have the events taken, all but those that never will be: they are returned as dead letters.

        A batch is not atomic: what comes before a bad event is taken although the answer is an error.
        Sending it again does no harm, since the metering API knows the ids. With `expiring`, events that
        have become too old are dead letters too. `on_sent` is called when a POST's body is written.
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
        """Part the events from those that are too old to be sent, where there is an age limit."""
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
    """Return the events one by one; a request's events come joined out of the spool."""
    return [orjson.dumps(event) for event in _parsed(events)]
