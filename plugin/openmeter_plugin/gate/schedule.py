"""Schedule of the questions to the metering API: whom to ask about next, within a budget of calls.

Three kinds, each with its own queue:
  * subjects without any reading: at once, up to 100 in one access query;
  * the access of all active subjects: every `refresh` seconds, up to 100 in one query;
  * balances, one call an account: the sooner the end is expected, the more often.
Where access queries are late, balances near their end take every second call, distant ones every fourth.
A subject is active until `active_for` seconds after its last request. Others are asked about every
`idle_refresh` seconds, and forgotten after `forget_after`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

BATCH: Final = 100
"""Keys in one access query, at most."""
_MIN_INTERVAL: Final = 0.5
_MAX_INTERVAL: Final = 30.0
_STEPS: Final = 5
"""How often a balance is asked for, at least, until it is used up at its present rate."""
_BURST_SECONDS: Final = 0.25
_NEAR_SHARE: Final = 2
_DISTANT_SHARE: Final = 4
"""One call in this many is for such a balance while access queries are due as well."""
_MIN_RATE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """The settings of the schedule."""

    max_calls: float = 200.0
    refresh: float = 1.5
    active_for: float = 60.0
    idle_refresh: float = 60.0
    forget_after: float = 3600.0
    batch: int = BATCH


class Query(NamedTuple):
    """Ask whether these subjects have access."""

    subjects: tuple[str, ...]


class Balance(NamedTuple):
    """Ask for the balances of an account."""

    account: str


Call = Query | Balance


class _Budget:
    """A token bucket of calls; a refusal for too many requests halves its rate, which recovers slowly."""

    def __init__(self, rate: float) -> None:
        self.limit = self.rate = rate
        self.paused_until = 0.0
        self._tokens = 0.0
        self._at: float | None = None

    def take(self, now: float) -> int:
        """Return how many calls may be made now; each that is made is spent."""
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self.rate = min(self.limit, self.rate * (1 + 0.05 * elapsed))
        self._tokens = min(self._tokens + elapsed * self.rate, max(1.0, self.rate * _BURST_SECONDS))
        return 0 if now < self.paused_until else int(self._tokens)

    def spend(self) -> None:
        self._tokens -= 1

    def refused(self, now: float, retry_after: float) -> None:
        if now >= self.paused_until:
            self.rate = max(_MIN_RATE, self.rate / 2)
        self.paused_until = max(self.paused_until, now + retry_after)


class _Due:
    """Names by when they are due; a new time for a name replaces the one before."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._due: dict[str, float] = {}

    def set(self, name: str, due: float) -> None:
        self._due[name] = due
        heapq.heappush(self._heap, (due, name))

    def drop(self, name: str) -> None:
        self._due.pop(name, None)

    def next(self) -> float | None:
        """Return when the next one is due."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float, limit: int) -> list[str]:
        """Return up to `limit` names that are due, which are not due again until they are set."""
        found: list[str] = []
        while len(found) < limit and (due := self.next()) is not None and due <= now:
            name = heapq.heappop(self._heap)[1]
            del self._due[name]
            found.append(name)
        return found


def _is_due(names: _Due, now: float) -> bool:
    due = names.next()
    return due is not None and due <= now


class Schedule:
    """What is due when. Times are those of one clock of the caller."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.budget = _Budget(pace.max_calls)
        self.batch = pace.batch
        self.last_seen: dict[str, float] = {}
        self._new: OrderedDict[str, None] = OrderedDict()
        self._queries = _Due()
        self._urgent: OrderedDict[str, None] = OrderedDict()
        self._balances = _Due()
        self._distant = _Due()
        self._queries_in_a_row = 0

    def seen(self, subject: str, now: float) -> None:
        """Note a request of a subject; one without a reading is asked about at once."""
        before = self.last_seen.get(subject)
        self.last_seen[subject] = now
        if before is None:
            self._new[subject] = None
        elif now - before > self.pace.active_for:
            self._queries.set(subject, now)

    def known(self, subjects: Iterable[str], asked: float) -> None:
        """Note that the access of subjects was asked for, at a time; they are due again later."""
        for subject in subjects:
            seen = self.last_seen.get(subject)
            if seen is None:
                continue
            active = asked - seen <= self.pace.active_for
            due = asked + (self.pace.refresh if active else self.pace.idle_refresh)
            self._queries.set(subject, due)

    def failed(self, call: Call, now: float) -> None:
        """Ask again soon what could not be asked."""
        again = now + self.pace.refresh
        if isinstance(call, Query):
            for subject in call.subjects:
                self._queries.set(subject, again)
        else:
            self.forget_balance(call.account)
            self._balances.set(call.account, again)

    def ask_one_by_one(self, subjects: Iterable[str]) -> None:
        """Ask about these subjects, and from now on about all, in a query each: the server has no other."""
        self.batch = 1
        self._new |= dict.fromkeys(subjects)

    def spend(self) -> None:
        """Note a call: some questions take several."""
        self.budget.spend()

    def refused(self, now: float, retry_after: float) -> None:
        """Note an answer 429: no calls until then, and fewer after it."""
        self.budget.refused(now, retry_after)

    def wants_balance(self, account: str) -> None:
        """Ask for the balances of an account at once."""
        self._urgent[account] = None

    def balance_read(self, account: str, asked: float, ends_in: float | None) -> None:
        """Note that balances were asked for; `ends_in` is when they are used up, if that is known."""
        if ends_in is None:
            interval = _MAX_INTERVAL
        else:
            interval = min(max(ends_in / _STEPS, _MIN_INTERVAL), _MAX_INTERVAL)
        self.forget_balance(account)
        (self._distant if interval == _MAX_INTERVAL else self._balances).set(account, asked + interval)

    def forget_balance(self, account: str) -> None:
        """Ask for the balances of an account no more: it has none."""
        self._balances.drop(account)
        self._distant.drop(account)

    def idle(self, now: float, is_needed: Callable[[str], bool] = lambda _: False) -> list[str]:
        """Forget subjects without a request for long that are not needed, and return them."""
        long_ago = now - self.pace.forget_after
        old = [it for it, seen in self.last_seen.items() if seen < long_ago and not is_needed(it)]
        for subject in old:
            del self.last_seen[subject]
            self._new.pop(subject, None)
            self._queries.drop(subject)
        return old

    def calls(self, now: float, room: int = 1_000) -> list[Call]:
        """Return the calls to make now, within the budget; `room` is how many may be in flight at once.

        Each call is taken off the budget by `spend`, when it is made.
        """
        free = min(self.budget.take(now), room)
        found: list[Call] = []
        while len(found) < free and self._new:
            batch = [self._new.popitem(last=False)[0] for _ in range(min(self.batch, len(self._new)))]
            found.append(Query(tuple(batch)))
        while len(found) < free and (call := self._next_due(now)) is not None:
            found.append(call)
        return found

    def _next_due(self, now: float) -> Call | None:
        """Return a call that is due; where both kinds are, they share."""
        is_near = bool(self._urgent) or _is_due(self._balances, now)
        share = _NEAR_SHARE if is_near else _DISTANT_SHARE
        if self._queries_in_a_row >= share - 1 and (account := self._next_balance(now)) is not None:
            self._queries_in_a_row = 0
            return Balance(account)
        if batch := self._queries.take(now, self.batch):
            self._queries_in_a_row += 1
            return Query(tuple(batch))
        account = self._next_balance(now)
        return None if account is None else Balance(account)

    def _next_balance(self, now: float) -> str | None:
        if self._urgent:
            account, _ = self._urgent.popitem(last=False)
            self.forget_balance(account)
            return account
        accounts = self._balances.take(now, 1) or self._distant.take(now, 1)
        return accounts[0] if accounts else None

    def backlog(self, now: float) -> float:
        """Return how many seconds the access queries are late."""
        due = self._queries.next()
        return 0.0 if due is None else max(0.0, now - due)
