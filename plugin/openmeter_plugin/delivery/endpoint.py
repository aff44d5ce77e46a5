"""A queue's way to its destination: one batch in, sent again until there is an answer to go by.

network, 5xx, 408       the endpoint is at fault: every queue that goes there waits, one tries
401, 403, 404, 429 ...  this queue's token, address or quota is: only this queue waits
400, 413, 422           the events are: RejectedError, for the caller to find the one
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.delivery.breaker import Breaker
from openmeter_plugin.delivery.client import EventsClient, RejectedError, UnauthorizedError, UndeliveredError
from openmeter_plugin.delivery.latency import Latency
from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, read_destination

_TIMEOUT: Final = 408
_LOOK_AFTER: Final = 1.0  # seconds


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
        self._own = Breaker()
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
        return max(self._own.failures, shared)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def attempt(self, events: Sequence[bytes], on_its_way: Callable[[], None] | None = None) -> bool:
        """Send once it makes sense; returns whether they are taken, else it is for another attempt.

        `on_its_way` is called when the POST's body is written. Raises RejectedError.
        """
        if self.stopping:
            raise asyncio.CancelledError
        destination = self._last or self._destination()
        shared = self._breakers.of(destination.endpoint if destination else "")
        task = asyncio.current_task()
        self.waiting.add(task)
        try:
            async with self._own.permission(), shared.permission():
                self.waiting.discard(task)
                # Looked at only now: a new token must reach a backlog that has waited.
                return await self._attempt(events, self._destination(), on_its_way)
        finally:
            self.waiting.discard(task)

    async def _attempt(
        self,
        events: Sequence[bytes],
        destination: Destination | None,
        on_its_way: Callable[[], None] | None,
    ) -> bool:
        shared = self._breakers.of(destination.endpoint if destination else "")
        known = {breaker: breaker.failures for breaker in (shared, self._own)}
        try:
            await self._post(events, destination, on_its_way)
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
        on_its_way: Callable[[], None] | None,
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
        await self._client.send(events, on_its_way)
        self.latency.observe(time.monotonic() - started)

    def _succeeded(self, shared: Breaker) -> None:
        if self._own.failures or shared.failures:
            self._log.info("delivery_works_again")
        self._own.succeeded()
        shared.succeeded()

    def _failed(
        self,
        error: UndeliveredError,
        destination: Destination | None,
        shared: Breaker,
        known: Mapping[Breaker, int],
    ) -> None:
        self.retries += 1
        endpoint_fails = error.status is None or error.status >= 500 or error.status == _TIMEOUT
        breaker = shared if endpoint_fails else self._own
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
        self._look_at = now + _LOOK_AFTER
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
