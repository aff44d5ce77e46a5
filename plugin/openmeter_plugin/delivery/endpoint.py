"""Endpoint of one queue: posts its batches until each event is delivered or a dead letter.

A failure opens one of two breakers, and an alarm holds the queue until its cause is gone:

network, 5xx, 408, a 4xx of anything but the API   the endpoint fails: all of its queues wait, one probes
401, 403, 404, 429 ...                             this queue's token, address or quota is at fault
400, 413, 422 of the API                           an event is invalid: it is found and becomes a dead letter
no token, unusable settings, no room for dead      the queue is held: its events wait, and health, metrics
letters, nearly everything refused                 and log say why
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Final, Literal

import orjson

from openmeter_plugin.books.store import DeadLetter
from openmeter_plugin.delivery.answers import RejectedError, UnauthorizedError, UndeliveredError
from openmeter_plugin.delivery.client import EventsClient, tls_of
from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.dead_letters import DeadLetterLimit
from openmeter_plugin.delivery.options import DeliveryOptions, in_words
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, read_destination


class Breaker:
    """Closed while POSTs succeed; open for a pause after a failure, then one POST decides.

    Without it, every queue with the same endpoint (one per token) would hammer one that is down. The pause
    grows with each consecutive failure, with jitter so that many gateways do not return at the same moment.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0
        self._probe = asyncio.Lock()

    @property
    def failures(self) -> int:
        """Consecutive failures."""
        return self._failures

    @asynccontextmanager
    async def permission(self) -> AsyncIterator[None]:
        """Wait until a POST makes sense; while the breaker is open, admit one at a time."""
        if self._failures:
            async with self._probe:
                if self._failures:  # otherwise it closed while we waited, and all may go at once
                    await asyncio.sleep(max(0.0, self._open_until - time.monotonic()))
                    yield
                    return
        yield

    def succeeded(self) -> None:
        """Close the breaker."""
        self._failures = 0
        self._open_until = 0.0

    def failed(
        self, initial: float, maximum: float, retry_after: float, failures_at_start: int | None = None
    ) -> float:
        """Open the breaker for a pause and return it in seconds: `initial`, doubled up to `maximum`.

        `retry_after` is the minimum that the server asked for. `failures_at_start` is the number of
        failures when the POST began: of several that fail concurrently, only the first is news.
        """
        if failures_at_start is not None and failures_at_start < self._failures:
            pause = max(retry_after, self._open_until - time.monotonic(), 0.0)
        else:
            doubled = min(initial * 2.0 ** min(self._failures, 64), maximum)
            pause = max(doubled * random.uniform(0.5, 1.0), retry_after)  # noqa: S311
            self._failures += 1
        self._open_until = max(self._open_until, time.monotonic() + pause)
        return pause


BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds

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


HoldReason = Literal["token", "settings", "refusals", "disk"]
HOLD_REASONS: Final[tuple[HoldReason, ...]] = ("token", "settings", "refusals", "disk")

_REMEDIES: Final[dict[HoldReason, str]] = {
    "token": "put the secret where Kong runs ({vault://env/a-b} is the variable A_B of its environment), or"
    " give this server --token-file",
    "settings": "correct the setting; delivery resumes without a restart if it is a file",
    "refusals": "find out what changed: the API, a proxy, a setting. Delivery resumes by itself once the API"
    " accepts events; `openmeter-plugin spool accept-refusals` makes dead letters of the refused ones",
    "disk": "free some space; dead letters must not take that of usage and books",
}


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a queue is held although its endpoint may be well."""

    reason: HoldReason
    text: str


class HeldError(UndeliveredError):
    """Nothing may be posted; the batch waits until the reason is gone."""

    def __init__(self, reason: HoldReason, text: str) -> None:
        super().__init__(text)
        self.hold = Hold(reason, text)


class _ReleasedError(Exception):
    """The metering API accepts events again: what it refused of a batch may be accepted, too."""


class Endpoint:
    """Posts one queue's batches. The options' endpoint and token override the queue's description."""

    def __init__(
        self, options: DeliveryOptions, queue: str, breakers: Breakers, clock: SteadyClock | None = None
    ) -> None:
        self._options = options
        self._clock = clock or SteadyClock()
        self._queue = queue
        self._breakers = breakers
        self._limit = DeadLetterLimit(options.spool, queue)
        self._queue_breaker = Breaker()
        self._client: EventsClient | None = None
        self._last: Destination | None = None
        self._reread_at = 0.0
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()
        self.retries = 0
        self.latency = Latency()
        """Durations of the successful POSTs."""
        self.held: Hold | None = None
        """Why nothing is posted, or no event becomes a dead letter; None if delivery works or is retried."""
        self.waiting: set[asyncio.Task[Any] | None] = set()
        """The tasks that wait for a breaker."""
        self.stopping = False
        """Whether to make no more attempts."""

    @property
    def max_batch_size(self) -> int:
        """Events per POST, by the description read last."""
        return self._described.max_batch_size

    @property
    def max_coalescing_delay(self) -> float:
        """Seconds to hold back a POST until its batch is full."""
        return self._described.max_coalescing_delay

    @property
    def concurrency(self) -> int:
        """Maximum number of POSTs in flight."""
        return self._described.concurrency

    @property
    def failing(self) -> int:
        """Consecutive failures of this queue or of its endpoint."""
        return max(self._queue_breaker.failures, self._shared.failures)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def send(
        self, events: Sequence[bytes], *, fresh: bool = False, written: asyncio.Future[None] | None = None
    ) -> list[DeadLetter]:
        """Send events until all are delivered, except those refused, which are returned as dead letters.

        Whether a real OpenMeter stores any of a refused batch depends on the fault: of an invalid event it
        stores nothing. Sending events again is harmless, because the metering API knows the ids. `fresh`
        events are posted for the first time: those that have grown too old become dead letters, and refusals
        count toward the limit. `written` is completed once a POST's body is written.
        """
        while True:
            try:
                return await self._send(events, fresh, written)
            except _ReleasedError:
                continue

    async def _send(
        self, events: Sequence[bytes], fresh: bool, written: asyncio.Future[None] | None
    ) -> list[DeadLetter]:
        dead: list[DeadLetter] = []
        while True:
            if fresh:
                events, expired = self._split_expired(events)
                dead += expired
            if not events:
                return dead
            try:
                if await self.attempt(events, written):
                    return dead
            except RejectedError as rejection:
                single = _split_events(events)
                if len(single) > 1:
                    suspects, events = _suspects(single, rejection.named)
                    dead += await self._send(suspects, fresh, written)
                elif rejection.only_too_large:
                    self._failed(_too_large(rejection, single[0]))
                else:
                    return [*dead, await self._condemned(single[0], rejection, fresh)]

    async def _condemned(self, event: bytes, rejection: RejectedError, fresh: bool) -> DeadLetter:
        """Return the dead letter; while there may be none, try the event again and again."""
        while fresh and (reason := self._limit.hinders()) is not None:
            what = {
                "refusals": "the metering API refuses nearly everything",
                "disk": "dead letters would fill the disk",
            }
            self._failed(HeldError(reason, f"{what[reason]}; HTTP {rejection.status}: {rejection}"))
            try:
                if await self.attempt([event]):
                    raise _ReleasedError
            except RejectedError as again:
                rejection = again
        if fresh:
            self._limit.refused()
            self._recovered()
        self._log.error("dead_letter", status=rejection.status, answer=str(rejection)[:300])
        return DeadLetter(event, rejection.status, str(rejection))

    async def attempt(self, events: Sequence[bytes], written: asyncio.Future[None] | None = None) -> bool:
        """POST once the breakers allow it; returns whether the events are delivered, else try again.

        Raises RejectedError.
        """
        if self.stopping:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self.waiting.add(task)
        try:
            async with self._queue_breaker.permission(), self._shared.permission():
                self.waiting.discard(task)
                return await self._attempt(events, written)
        finally:
            self.waiting.discard(task)

    async def _attempt(self, events: Sequence[bytes], written: asyncio.Future[None] | None) -> bool:
        failures_at_start = (self._shared.failures, self._queue_breaker.failures)
        try:
            # Read the description only now: a backlog that has waited needs the newest token.
            client = await self._client_for(self._destination())
            started = time.monotonic()
            await client.post(events, written)
        except UndeliveredError as error:
            self._failed(error, failures_at_start)
            return False
        except RejectedError as rejection:
            self._shared.succeeded()  # an answer about the events: the endpoint works
            is_held = self.held is not None and self.held.reason in ("refusals", "disk")
            if not is_held and not rejection.only_too_large:
                self._recovered()
            raise
        self.latency.observe(time.monotonic() - started)
        self._limit.accepted(len(events))
        self._recovered()
        return True

    async def _client_for(self, destination: Destination) -> EventsClient:
        """Return the client; it is a new one if its destination or a certificate has changed."""
        network = self._options.network
        try:
            if (
                self._client is None
                or self._client.destination != destination
                or self._client.tls is not tls_of(destination, network)
            ):
                await self.close()
                self._client = EventsClient(destination, network)
        except (ValueError, OSError) as error:
            raise HeldError("settings", in_words(error)) from None
        return self._client

    def _recovered(self) -> None:
        if self.failing or self.held:
            self._log.info("delivery_recovered")
        self.held = None
        self._queue_breaker.succeeded()
        self._shared.succeeded()

    def _failed(self, error: UndeliveredError, failures_at_start: tuple[int, int] | None = None) -> None:
        self.retries += 1
        shared = self._shared
        breaker = shared if error.endpoint_fails else self._queue_breaker
        if error.status and not error.endpoint_fails:
            shared.succeeded()  # the endpoint answers, so it is up for all other queues
        destination = self._described
        before = None if failures_at_start is None else failures_at_start[breaker is self._queue_breaker]
        pause = breaker.failed(
            destination.initial_retry_delay, destination.max_retry_delay, error.retry_after, before
        )
        held, self.held = self.held, error.hold if isinstance(error, HeldError) else None
        is_news = self.held is not None and (held is None or held.reason != self.held.reason)
        if not self._failure_limit.passes() and not is_news:
            return
        facts: dict[str, Any] = {
            "reason": str(error)[:300],
            "failures": breaker.failures,
            "next_try_seconds": round(pause, 2),
            "consequence": "the events wait in the spool",
        }
        if self.held is not None:
            self._log.critical(
                "delivery_held", hold=self.held.reason, **facts, remedy=_REMEDIES[self.held.reason]
            )
        elif isinstance(error, UnauthorizedError):
            self._log.critical("token_refused", **facts, remedy="configure a token that may ingest events")
        else:
            self._log.error("delivery_failed", **facts)

    @property
    def _shared(self) -> Breaker:
        """The breaker of the endpoint."""
        return self._breakers.of(self._described.endpoint)

    @property
    def _described(self) -> Destination:
        """The destination as it was read last, with or without a token; one with defaults before that."""
        if self._last is None:
            try:
                self._last = self._read()
            except (OSError, ValueError):
                return _UNKNOWN
        return self._last or _UNKNOWN

    def _destination(self) -> Destination:
        """Return the destination by its current description, so that a new token reaches a waiting backlog.

        While POSTs succeed, the description is read once a second. Raises HeldError.
        """
        now = time.monotonic()
        if self._last is None or now >= self._reread_at or self.failing or self.held:
            self._reread_at = now + _REREAD_SECONDS
            try:
                described = self._read()
                token = self._options.token()
            except (OSError, ValueError) as error:
                if self._client is None:
                    raise HeldError("settings", in_words(error)) from None
                if self._failure_limit.passes():
                    self._log.error("destination_unreadable", reason=in_words(error))
                return self._client.destination
            if described is None:
                raise HeldError("settings", "this queue has no destination: destination.json is missing")
            self._last = described if token is None else replace(described, token=token)
        if self._last.token is None and (origin := self._last.token_from):
            raise HeldError(
                "token",
                "there is no token, and none is stored from before: "
                + (f"Kong could not resolve {origin}" if origin != "api_token" else "api_token is not here"),
            )
        return self._last

    def _read(self) -> Destination | None:
        address = self._options.endpoint
        try:
            described = read_destination(self._options.spool, self._queue)
        except ValueError:
            if address is None:
                raise
            described = None  # the configured address is used instead
        if address is not None:
            described = replace(described or Destination(self._queue, ""), endpoint=address)
        return described

    def _split_expired(self, events: Sequence[bytes]) -> tuple[Sequence[bytes], list[DeadLetter]]:
        """Split off the events that are older than the age limit, if there is one."""
        max_age = self._options.max_age
        if max_age is None or not events or not self._clock.settled:
            return events, []
        oldest = (self._clock.utc() - max_age).strftime("%Y-%m-%dT%H:%M:%S")
        parsed = _parsed(events)
        if all(str(event.get("time")) >= oldest for event in parsed):
            return events, []
        answer = f"not delivered within {max_age}, the configured age limit"
        young = [orjson.dumps(event) for event in parsed if str(event.get("time")) >= oldest]
        old = [orjson.dumps(event) for event in parsed if str(event.get("time")) < oldest]
        return young, [DeadLetter(event, None, answer) for event in old]


_UNKNOWN: Final = Destination("", "", max_batch_size=1, concurrency=1, max_coalescing_delay=0.0)


def _too_large(rejection: RejectedError, event: bytes) -> UndeliveredError:
    return UndeliveredError(
        f"HTTP {rejection.status} for a single event of {len(event)} bytes, which is not the metering API's:"
        f" raise the limit of what is in between. {rejection}",
        rejection.status,
    )


def _suspects(events: list[bytes], named: Sequence[int]) -> tuple[list[bytes], list[bytes]]:
    """Divide a refused batch into what to post first and the rest: those named, else the first half."""
    first = next((position for position in named if position < len(events)), None)
    if first is None:
        middle = len(events) // 2
        return events[:middle], events[middle:]
    return [events[first]], events[:first] + events[first + 1 :]


def _parsed(events: Sequence[bytes]) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(events) + b"]")
    return parsed


def _split_events(events: Sequence[bytes]) -> list[bytes]:
    """Return the events one by one; in the spool, a request's events are joined."""
    return [orjson.dumps(event) for event in _parsed(events)]
