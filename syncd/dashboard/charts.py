"""Geometry of the charts, which the macros of ``charts.html`` draw as SVG without a script. Pure: no I/O.

The plot of a chart is stretched to the width of the page; its labels are HTML beside it, so that they have
the page's font size on a phone too. Colours are those of the style sheet, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

WIDTH: Final = 1000
HEIGHT: Final = 200
_GAP: Final = 0.25
"""The part of a bar's slot that stays empty."""
_MAX_BARS: Final = 100
"""Above this, several days share a bar: a bar of less than 3 pixels cannot be seen on a phone."""


@dataclass(frozen=True, slots=True)
class Point:
    """One bar, and the value that it is compared with, if there is one."""

    label: str
    value: float
    before: float | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in the units of the plot."""

    x: float
    y: float
    width: float
    height: float
    point: Point


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars over time with a line for the period before."""

    title: str
    description: str
    points: tuple[Point, ...]
    bars: tuple[Bar, ...]
    line: str
    """The points of the line in SVG's syntax; empty without a period before."""
    ticks: tuple[tuple[float, float], ...]
    """The lines across: their position from the top, and the value there."""
    top: float

    @property
    def compared(self) -> bool:
        """Return whether the points have values of the period before."""
        return bool(self.line)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels below the plot: the first, the middle and the last one."""
        if len(self.points) < 3:
            return tuple(point.label for point in self.points)
        return self.points[0].label, self.points[len(self.points) // 2].label, self.points[-1].label


def chart(title: str, what: str, points: Sequence[Point]) -> Chart:
    """Return a chart of these points; `what` is counted: ``requests``."""
    highest = max((max(point.value, point.before or 0) for point in points), default=0)
    top = _round_up(highest)
    slot = WIDTH / max(len(points), 1)
    bars = tuple(
        Bar(
            _short(index * slot + slot * _GAP / 2),
            _short(_y(point.value, top)),
            _short(slot * (1 - _GAP)),
            _short(HEIGHT - _y(point.value, top)),
            point,
        )
        for index, point in enumerate(points)
    )
    line = " ".join(
        f"{_short(index * slot + slot / 2):g},{_short(_y(point.before, top)):g}"
        for index, point in enumerate(points)
        if point.before is not None
    )
    ticks = tuple((_short(_y(top * part, top)), top * part) for part in (1, 0.5))
    return Chart(title, _described(what, points), tuple(points), bars, line, ticks, top)


def per_day(since: date, values: Sequence[float], before: Sequence[float | None]) -> list[Point]:
    """Return a point for each day, or for several days of a long range; `before` may be shorter."""
    step = math.ceil(len(values) / _MAX_BARS)
    points = []
    for start in range(0, len(values), step):
        earlier = [value for value in before[start : start + step] if value is not None]
        first = since + timedelta(days=start)
        last = since + timedelta(days=min(start + step, len(values)) - 1)
        label = first.isoformat() if first == last else f"{first.isoformat()} to {last.isoformat()}"
        points.append(Point(label, sum(values[start : start + step]), sum(earlier) if earlier else None))
    return points


def _described(what: str, points: Sequence[Point]) -> str:
    if not points:
        return f"No {what}."
    highest = max(points, key=lambda point: point.value)
    total = sum(point.value for point in points)
    text = f"{total:,.0f} {what} in all; most on {highest.label}: {highest.value:,.0f}."
    if any(point.before is not None for point in points):
        text += f" The period before: {sum(point.before or 0 for point in points):,.0f}."
    return text


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - value / top) if top else float(HEIGHT)


def _short(value: float) -> float:
    return round(value, 2)


def _round_up(value: float) -> float:
    """Return the round number at or above a value: 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10, 20) if power * step >= value)
