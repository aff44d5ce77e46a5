"""Polling for a condition, with a deadline instead of a fixed sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def eventually(probe: Callable[[], _T | None], *, seconds: float = 30, what: str = "it") -> _T:
    """Return the first truthy answer of `probe`; fails the test at the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not happen within {seconds} s")
