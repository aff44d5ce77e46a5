"""What the benchmarks have in common: a goal, and whether it is met."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A ratio or figure that must be met, and whether it is."""

    what: str
    wanted: str
    measured: str
    met: bool
