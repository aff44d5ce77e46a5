"""Local counts: what was accepted here and the metering API cannot have counted yet, and what is under way.

The metering API counts an event some time after its delivery. A reading of what is left therefore misses
the newest usage of this node. Each accepted record belongs to a lot, and a lot is counted in a reading that
was requested at least `counted_after` seconds after the lot's last event was delivered. While that is
uncertain, the lot is taken off what is left: it may be taken off twice for a moment, never not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

_LOT_SECONDS: Final = 1.0
_MAX_OPEN_LOTS: Final = 60
"""Lots grow while delivery is stopped, so that an outage of hours has no more of them than this."""
_EARLY_SECONDS: Final = 5.0
"""How long a log may come before the report of its request."""
_REPORT_SECONDS: Final = 0.8
"""When the report has normally arrived: Kong's workers report every half second."""


class Segment(NamedTuple):
    """A segment of the spool, whose offsets say what of it is delivered."""

    queue: str
    name: str


@dataclass(slots=True)
class Lot:
    """Records that were accepted at about the same time: where they end, and when they were delivered."""

    opened: float
    ends: dict[Segment, int] = field(default_factory=dict)
    delivered_at: float | None = None


class Lots:
    """The lots that some count may still refer to, by number. Times are those of one clock of the caller."""

    def __init__(self, counted_after: float) -> None:
        self.counted_after = counted_after
        self.lots: dict[int, Lot] = {}
        self._newest = 0

    def current(self, now: float) -> int:
        """Return the number of the lot that takes what is accepted now."""
        lot = self.lots.get(self._newest)
        if lot is None or lot.delivered_at is not None or now - lot.opened >= self._length(now):
            self._newest += 1
            self.lots[self._newest] = Lot(now)
        return self._newest

    def _length(self, now: float) -> float:
        oldest = next((lot.opened for lot in self.lots.values() if lot.delivered_at is None), now)
        return max(_LOT_SECONDS, (now - oldest) / _MAX_OPEN_LOTS)

    def ends_at(self, number: int, segment: Segment, offset: int) -> None:
        """Note that a lot's records reach this far in a segment."""
        self.lots[number].ends[segment] = offset

    def note_delivered(self, is_delivered: Callable[[Segment, int], bool], now: float) -> None:
        """Note which lots are entirely delivered by now."""
        for lot in self.lots.values():
            if lot.delivered_at is None and all(is_delivered(*end) for end in lot.ends.items()):
                lot.delivered_at = now

    def is_counted(self, number: int, reading_at: float) -> bool:
        """Return whether a reading that was requested at this time has certainly counted the lot."""
        lot = self.lots.get(number)
        if lot is None:
            return True
        return lot.delivered_at is not None and lot.delivered_at + self.counted_after <= reading_at

    def forget(self, used: Iterable[int]) -> None:
        """Forget the lots that no count refers to any more."""
        keep = {*used, self._newest}
        self.lots = {number: lot for number, lot in self.lots.items() if number in keep}

    def saved(self, now: float) -> list[Any]:
        """Return the lots for the state on disk, with ages instead of times."""
        return [
            [
                number,
                now - lot.opened,
                None if lot.delivered_at is None else now - lot.delivered_at,
                [[*segment, end] for segment, end in lot.ends.items()],
            ]
            for number, lot in self.lots.items()
        ]

    def restore(self, saved: list[Any], now: float) -> None:
        """Take the lots of an earlier process."""
        for number, opened, delivered, ends in saved:
            lot = Lot(now - opened, {Segment(queue, name): end for queue, name, end in ends})
            lot.delivered_at = None if delivered is None else now - delivered
            self.lots[number] = lot
            self._newest = max(self._newest, number)


class Reservations:
    """What Kong let pass and no log has settled yet: requests under way.

    A log settles the oldest reservation. A reservation without a log expires: that request was not metered,
    for example because another plugin refused it. A log may come before the report of its request. Requests
    that Kong did not count, because it had no decision yet, are reported and reserved as well.
    """

    __slots__ = ("_early", "_open", "_since_report", "_strange", "total")

    def __init__(self) -> None:
        self.total = 0.0
        self._since_report = 0.0
        self._open: deque[list[float]] = deque()  # [expires, requests, amount of each]
        self._early: deque[list[float]] = deque()  # [logged at, requests]
        self._strange: deque[list[float]] = deque()  # the same, before Kong had a decision

    def __bool__(self) -> bool:
        return bool(self._open)

    def reserve(
        self, requests: float, cost: float, now: float, reserved_for: float, *, counted: bool = True
    ) -> None:
        """Reserve for requests that passed, without those whose logs came before; `counted` is Kong's."""
        waiting = (self._early,) if counted else (self._strange, self._early)
        requests -= _taken(requests, now, *waiting)
        if requests > 0:
            self._open.append([now + reserved_for, requests, cost])
            self.total += requests * cost

    def take_strange(self, other: Reservations) -> None:
        """Take over the logs that came before Kong had a decision, and what is reserved for such requests."""
        self._strange.extend(other._strange)
        self._open.extend(other._open)
        self.total += other.total

    def settle(self, requests: float, now: float, *, counted: bool = True) -> None:
        """Settle the oldest reservations with the logs of this many requests.

        `counted` says that Kong may have counted them, so that a log may come before its request is reported.
        """
        while requests > 0 and self._open:
            oldest = self._open[0]
            settled = min(requests, oldest[1])
            requests -= settled
            oldest[1] -= settled
            self.total -= settled * oldest[2]
            if oldest[1] <= 0:
                self._open.popleft()
        if requests > 0:
            logs = self._early if counted else self._strange
            self._since_report += requests if counted else 0.0
            while logs and now - logs[0][0] >= _EARLY_SECONDS:
                logs.popleft()
            logs.append([now, requests])
        if not self._open:
            self.total = 0.0  # no remainder of a float

    def reported(self) -> None:
        """Note a report of Kong's counter: logs that wait on are of requests that no counter has."""
        self._since_report = 0.0

    def ahead(self, now: float) -> float:
        """Return how many requests were logged whose report may be on its way."""
        if not self._since_report:
            return 0.0
        fresh = sum(requests for at, requests in self._early if now - at < _REPORT_SECONDS)
        return min(fresh, self._since_report)

    def expire(self, now: float) -> bool:
        """Drop reservations that no log will settle; returns whether there were any."""
        dropped = False
        while self._open and self._open[0][0] <= now:
            _, requests, cost = self._open.popleft()
            self.total -= requests * cost
            dropped = True
        if not self._open:
            self.total = 0.0
        return dropped

    def saved(self, now: float) -> list[list[float]]:
        """Return the open reservations for the state on disk, with the seconds they have left."""
        return [[expires - now, requests, cost] for expires, requests, cost in self._open]

    @classmethod
    def restored(cls, saved: list[list[float]], now: float) -> Reservations:
        """Return the reservations of an earlier process."""
        found = cls()
        for left, requests, cost in saved:
            found._open.append([now + left, requests, cost])
            found.total += requests * cost
        return found


def _taken(requests: float, now: float, *waiting: deque[list[float]]) -> float:
    """Remove this many logs from those that wait for their request's report; returns how many there were."""
    taken = 0.0
    for logs in waiting:
        while taken < requests and logs:
            found = min(requests - taken, logs[0][1]) if now - logs[0][0] < _EARLY_SECONDS else 0.0
            taken += found
            logs[0][1] -= found
            if not found or logs[0][1] <= 0:
                logs.popleft()
    return taken
