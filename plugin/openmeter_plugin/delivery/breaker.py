"""Circuit breaker per endpoint: while the endpoint is down, one POST at a time probes it.

Otherwise every queue with the same endpoint (one per token) would hammer it. The pause grows with each
consecutive failure, with jitter so that many gateways do not return at the same moment.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Breaker:
    """Closed while POSTs succeed; open for a pause after a failure, then one POST decides."""

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
