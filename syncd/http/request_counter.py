"""How many requests this process sent to which API, and how they were answered; read by the metrics."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_calls: Counter[tuple[str, str, str]] = Counter()


def count(api: str, method: str, status: str) -> None:
    """Note one request; `status` is the code, or ``none`` where no answer came."""
    with _lock:
        _calls[api, method, status] += 1


def totals() -> dict[tuple[str, str, str], int]:
    """Return the requests since the start of the process by API, method and status."""
    with _lock:
        return dict(_calls)
