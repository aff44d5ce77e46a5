"""A breaker per endpoint: while it is down, one try at a time finds out whether it is back.

Queues with the same endpoint (one per token) would otherwise each hammer it. The pause grows with each
failure in a row, with jitter so that many gateways do not come back at the same moment.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Breaker:
    """Closed while all is well; after a failure open for a pause, then one try decides."""

    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0
        self._probe = asyncio.Lock()

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    @asynccontextmanager
    async def permission(self) -> AsyncIterator[None]:
        """Wait until a try makes sense; while the breaker is open, for one at a time."""
        if self._failures:
            async with self._probe:
                if self._failures:  # else it was closed while we waited, and nobody needs to go alone
                    await asyncio.sleep(max(0.0, self._open_until - time.monotonic()))
                    yield
                    return
        yield

    def succeeded(self) -> None:
        """Close it."""
        self._failures = 0
        self._open_until = 0.0

    def failed(self, initial: float, longest: float, at_least: float, known: int | None = None) -> float:
        """Open it for a pause and return that, in seconds: from `initial` doubled up to `longest`.

        `at_least` is what the server asked for (Retry-After). `known` is how many failures there were when
        the try began: of several that fail side by side, only the first says anything new.
        """
        if known is not None and known < self._failures:
            pause = max(at_least, self._open_until - time.monotonic(), 0.0)
        else:
            doubled = min(initial * 2.0 ** min(self._failures, 64), longest)
            pause = max(doubled * random.uniform(0.5, 1.0), at_least)  # noqa: S311
            self._failures += 1
        self._open_until = max(self._open_until, time.monotonic() + pause)
        return pause
