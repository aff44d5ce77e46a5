"""Accounts: what each customer may still use of each feature, decided from readings and local counts.

Constraints
  * What a fresh reading plus the local counts forbid is never allowed, and what they allow never denied,
    whatever the order of readings, counts, gaps and restarts.
  * Kong counts on its own between two lines, so a line must mean the same whenever it arrives: it is a
    ceiling of Kong's counter, the sum of `base`, the newest counter that is known here, and `left`.

`left` = the balance of the newest exact reading, less the lots that it cannot have counted (`counts.Lots`),
less the reservations of requests under way. A reading is exact if it has the balance. The access query of
the metering API has none: it only says whether there is access, which a later exact reading confirms.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

from openmeter_plugin.gate.counts import Lots, Reservations

_Name = TypeVar("_Name", bound=Hashable)
_MAX_OUTDATED: Final = 1_000
"""Outdated places that are kept in any case; beyond it, as many as there are names."""


class Changes(Generic[_Name]):
    """Names by the number of their newest change: what Kong must be sent again, from any number on.

    Each name has one place, that of its newest change. A full state of 400,000 names is sent in 200 slices,
    so the place of a number is found by bisection, not by walking there.
    """

    def __init__(self) -> None:
        self.number = 0
        self.forgotten_up_to = 0
        """Changes up to this one may lack what was forgotten; older numbers need the full state."""
        self._numbers: dict[_Name, int] = {}
        self._log: list[tuple[int, _Name]] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def note(self, name: _Name) -> None:
        """Note a change of a name."""
        self.number += 1
        self._numbers[name] = self.number
        self._log.append((self.number, name))
        if len(self._log) > 2 * len(self._numbers) + _MAX_OUTDATED:
            self._log = [(number, name) for number, name in self._log if self._numbers.get(name) == number]

    def since(self, number: int, limit: int | None = None) -> list[tuple[int, _Name]]:
        """Return up to `limit` of what changed after a number, oldest first."""
        start = bisect_right(self._log, number, key=lambda change: change[0])
        places = (self._log[index] for index in range(start, len(self._log)))
        return list(islice((it for it in places if self._numbers.get(it[1]) == it[0]), limit))

    def forget_oldest(self, surplus: int, is_live: Callable[[_Name], bool]) -> None:
        """Forget the oldest changes of names that are not live any more."""
        for number, name in self.since(0):
            if surplus <= 0:
                return
            if not is_live(name):
                del self._numbers[name]
                self.forgotten_up_to = max(number, self.forgotten_up_to)
                surplus -= 1


class Reason(StrEnum):
    """Why a request is stopped; the names are those of Kong's own plugin."""

    USAGE_LIMIT_REACHED = "USAGE_LIMIT_REACHED"
    FEATURE_UNAVAILABLE = "FEATURE_UNAVAILABLE"
    FEATURE_NOT_FOUND = "FEATURE_NOT_FOUND"
    CUSTOMER_NOT_FOUND = "CUSTOMER_NOT_FOUND"
    NO_CREDIT_AVAILABLE = "NO_CREDIT_AVAILABLE"
    STALE = "STALE"


class Key(NamedTuple):
    """A feature of an account."""

    account: str
    feature: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the metering API said about a feature of an account.

    `at` is when it was asked, `balance` what was left then, None for no limit. Without `exact` the balance is
    not known, only whether there is access.
    """

    at: float
    reason: Reason | None
    """None if there is access."""
    exact: bool
    balance: float | None = None
    quota: float | None = None
    reset: float = 0.0


class Decision(NamedTuple):
    """Whether a feature may be used: a reason, or None and what is left (None for no limit)."""

    reason: Reason | None
    left: float | None
    reset: float
    quota: float | None


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide."""

    costs: Mapping[str, float]
    """What a request adds to the counter of each feature."""
    unknown_customer: Literal["allow", "deny"] = "allow"
    on_stale: Literal["allow", "deny"] = "allow"
    max_stale: float = 300.0
    reserved_for: float = 60.0
    has_numbers: bool = True
    """Whether the metering API can be asked for balances. If not, access alone decides."""


@dataclass(slots=True)
class Entry:
    """What is known about a key."""

    reason: Reason | None = None
    access_at: float = float("-inf")
    balance: float | None = None
    balance_at: float = float("-inf")
    quota: float | None = None
    reset: float = 0.0
    counts: dict[int, float] = field(default_factory=dict)
    """Accepted amounts by lot."""
    reservations: Reservations | None = None
    counters: dict[str, float] = field(default_factory=dict)
    """Kong's counter, by the id of its dict."""
    reported: frozenset[str] = frozenset()
    """The dicts whose counter was reported to this process; others may have counted on since."""
    shown: Decision | None = None
    shown_counters: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there was any reading."""
        return self.access_at > float("-inf")


_EXACT: Final = 1_000
"""With less than this left, a ceiling that has become too high is corrected however little it is off."""
_SLACK: Final = 20
"""Any other is corrected once it is off by more than a twentieth of what is left."""
_MAX_TOMBSTONES: Final = 20_000


class Accounts:
    """All accounts, subjects and overrides of a node, and the numbered changes of its decisions."""

    def __init__(self, policy: Policy, lots: Lots) -> None:
        self.policy = policy
        self.lots = lots
        self.subjects: dict[str, str] = {}
        self.entries: dict[Key, Entry] = {}
        self.overrides: dict[str, float] = {}
        """Until when an account is allowed everything."""
        self.has_one_kong = True
        """Whether all records are those of one dict of a Kong."""
        self.changes: Changes[str | Key] = Changes()
        """Changed subjects, and changed decisions."""
        self.kongs: set[str] = set()
        """The ids of Kong's dicts that were known from their beginning, when all their counters were 0."""
        self._members: Counter[str] = Counter()
        self._restored = False
        self._reserving: set[Key] = set()
        self._ahead: set[Key] = set()
        """Keys with logs whose requests may be in a report that is on its way."""

    def account_of(self, subject: str) -> str:
        """Return the account of a subject; the subject itself as long as no account is known."""
        return self.subjects.get(subject, subject)

    def assign(self, subject: str, account: str, now: float) -> None:
        """Note which account pays for a subject; what was counted for the subject becomes the account's."""
        before = self.subjects.get(subject)
        if before == account:
            return
        self.subjects[subject] = account
        self._members[account] += 1
        if before is not None:
            self._left(before)
        if before is None and account != subject:
            for feature in self.policy.costs:
                self._merge(Key(subject, feature), Key(account, feature), now)
        self.changes.note(subject)

    def _merge(self, source: Key, target: Key, now: float) -> None:
        found = self.entries.pop(source, None)
        if found is None:
            return
        into = self._entry(target)
        for lot, amount in found.counts.items():
            into.counts[lot] = into.counts.get(lot, 0.0) + amount
        if found.reservations is not None:
            self._reservations(target, into).take_strange(found.reservations)
        self._update(target, into, now)

    def _reservations(self, key: Key, entry: Entry) -> Reservations:
        if entry.reservations is None:
            entry.reservations = Reservations()
        self._reserving.add(key)
        return entry.reservations

    def apply(self, key: Key, reading: Reading, now: float) -> None:
        """Take a reading. An older one than the newest changes nothing."""
        entry = self._entry(key)
        if reading.exact and reading.at >= entry.balance_at:
            entry.balance, entry.balance_at = reading.balance, reading.at
            entry.quota, entry.reset = reading.quota, reading.reset
            counted = [lot for lot in entry.counts if self.lots.is_counted(lot, reading.at)]
            for lot in counted:
                del entry.counts[lot]
        if reading.at >= entry.access_at:
            entry.reason, entry.access_at = reading.reason, reading.at
        self._update(key, entry, now)

    def count(self, account: str, amounts: Mapping[str, float], requests: int, lot: int, now: float) -> None:
        """Count the amounts of accepted requests by feature, and settle their reservations."""
        for feature, cost in self.policy.costs.items():
            amount = amounts.get(feature, 0.0)
            key = Key(account, feature)
            entry = self.entries.get(key)
            if entry is None:
                if not amount:
                    continue
                entry = self._entry(key)
            if amount:
                entry.counts[lot] = entry.counts.get(lot, 0.0) + amount
            if cost:
                if entry.reservations is None:
                    entry.reservations = Reservations()
                counted = entry.shown is not None or self._restored  # Kong may have counted before
                entry.reservations.settle(requests, now, counted=counted)
                if entry.reservations.ahead(now):
                    self._ahead.add(key)
            self._update(key, entry, now)

    def passed(self, kong: str, key: Key, counter: float, now: float) -> None:
        """Note Kong's counter of a key. It rises by the feature's cost with each request that passes."""
        entry = self.entries.get(key)
        cost = self.policy.costs.get(key.feature, 0.0)
        if entry is None or not cost:
            return
        before = entry.counters.get(kong, 0.0 if kong in self.kongs else counter)
        if counter > before:
            reservations = self._reservations(key, entry)
            reservations.reserve((counter - before) / cost, cost, now, self.policy.reserved_for)
        if counter >= before and entry.reservations is not None:
            entry.reservations.reported()
        entry.counters[kong] = max(counter, before)
        if kong not in entry.reported:
            entry.reported |= {kong}
            self.changes.note(key)  # with a base from now on
        self._update(key, entry, now)

    def passed_uncounted(self, subject: str, feature: str, requests: float, now: float) -> None:
        """Note requests that passed before Kong had a ceiling: logs of them come, and no counter has them."""
        cost = self.policy.costs.get(feature, 0.0)
        if cost:
            key = Key(self.account_of(subject), feature)
            entry = self._entry(key)
            reservations = self._reservations(key, entry)
            reservations.reserve(requests, cost, now, self.policy.reserved_for, counted=False)
            self._update(key, entry, now)

    def base(self, key: Key, kong: str, now: float, *, born: bool) -> float | None:
        """Return the counter that `left` is computed for; None if Kong may have counted on since.

        `born` says that this process has known Kong's dict from its beginning. A record that came before the
        report of its request is taken off `left`, so Kong's counter is ahead of the newest report by it.
        """
        entry = self.entries[key]
        if kong in entry.reported:
            return entry.counters[kong] + self._ahead_of(key, entry, now)
        return self._ahead_of(key, entry, now) if born and kong not in entry.counters else None

    def _ahead_of(self, key: Key, entry: Entry, now: float) -> float:
        """Return by how much Kong's counter is ahead of its report; of several Kongs, it may be any."""
        if entry.reservations is None or not self.has_one_kong:
            return 0.0
        return entry.reservations.ahead(now) * self.policy.costs.get(key.feature, 0.0)

    def expire_ahead(self, now: float) -> None:
        """Correct ceilings for records whose report did not come: Kong did not count their requests."""
        for key in list(self._ahead):
            entry = self.entries.get(key)
            if entry is None or entry.reservations is None or not entry.reservations.ahead(now):
                self._ahead.discard(key)
            if entry is not None:
                self._update(key, entry, now)

    def expire(self, now: float) -> None:
        """Drop reservations that no log will settle, and overrides that have ended."""
        for key in [key for key in self._reserving if self._expired(key, now)]:
            self._reserving.discard(key)
        for account in [account for account, until in self.overrides.items() if until <= now]:
            del self.overrides[account]
            self._update_account(account, now)

    def _expired(self, key: Key, now: float) -> bool:
        entry = self.entries.get(key)
        if entry is None or entry.reservations is None:
            return True
        if entry.reservations.expire(now):
            self._update(key, entry, now)
        return not entry.reservations

    def give_up_numbers(self, now: float) -> None:
        """Let access alone decide from now on: the metering API has no balances."""
        self.policy = replace(self.policy, has_numbers=False)
        for key, entry in self.entries.items():
            self._update(key, entry, now)

    def override(self, account: str, until: float, now: float) -> None:
        """Allow an account everything until a time; one that has passed ends the override."""
        if until > now:
            self.overrides[account] = until
        else:
            self.overrides.pop(account, None)
        self._update_account(account, now)

    def check_stale(self, now: float) -> None:
        """Decide again about all that may have become stale."""
        for key, entry in self.entries.items():
            if now - entry.access_at > self.policy.max_stale:
                self._update(key, entry, now)

    def has_uncounted(self, subject: str, now: float) -> bool:
        """Return whether a reading of now could miss some of what the account of a subject used."""
        keys = (Key(self.account_of(subject), feature) for feature in self.policy.costs)
        entries = (entry for key in keys if (entry := self.entries.get(key)) is not None)
        return any(not self.lots.is_counted(lot, now) for entry in entries for lot in entry.counts)

    def forget(self, subject: str) -> None:
        """Forget a subject, and its account with the last of its subjects."""
        account = self.subjects.pop(subject, None)
        if account is None:
            if subject not in self._members:
                for feature in self.policy.costs:
                    self.entries.pop(Key(subject, feature), None)  # counted, but never answered about
            return
        self.changes.note(subject)
        self._left(account)
        self._bound_tombstones()

    def _left(self, account: str) -> None:
        """Forget an account without subjects."""
        self._members[account] -= 1
        if self._members[account] > 0:
            return
        del self._members[account]
        for feature in self.policy.costs:
            if self.entries.pop(Key(account, feature), None) is not None:
                self.changes.note(Key(account, feature))

    def decide(self, key: Key, now: float) -> Decision | None:
        """Return the decision about a key, None if nothing is known about it."""
        entry = self.entries.get(key)
        return None if entry is None or not entry.known else self._decision(key, entry, now)

    def _decision(self, key: Key, entry: Entry, now: float) -> Decision | None:
        if self.overrides.get(key.account, 0.0) > now:
            return Decision(None, None, 0.0, None)
        if now - entry.access_at > self.policy.max_stale:
            stale = Reason.STALE if self.policy.on_stale == "deny" else None
            return Decision(stale, None, 0.0, None)
        reason = entry.reason
        if reason is Reason.CUSTOMER_NOT_FOUND and self.policy.unknown_customer == "allow":
            return Decision(None, None, 0.0, None)
        if reason is None and self._lacks_number(entry):
            return entry.shown
        left = self.left(entry)
        if reason is None and left is not None and left <= 0:
            reason = Reason.USAGE_LIMIT_REACHED
        return Decision(reason, None if reason else left, entry.reset, entry.quota)

    def left(self, entry: Entry) -> float | None:
        """Return what is left of a balance after all that it cannot have counted; None for no limit."""
        if entry.balance is None:
            return None
        at = entry.balance_at
        left = entry.balance - sum(
            amount for lot, amount in entry.counts.items() if not self.lots.is_counted(lot, at)
        )
        return left - entry.reservations.total if entry.reservations is not None else left

    def needs_number(self, key: Key) -> bool:
        """Return whether an exact reading might lead to another decision than the newest reading."""
        entry = self.entries.get(key)
        if entry is None or not entry.known:
            return True
        if entry.reason is not None or not self.policy.has_numbers:
            return False
        left = self.left(entry)
        return self._lacks_number(entry) or (
            entry.balance_at < entry.access_at and left is not None and left <= 0
        )

    def _lacks_number(self, entry: Entry) -> bool:
        return self.policy.has_numbers and entry.balance_at == float("-inf")

    def _entry(self, key: Key) -> Entry:
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = Entry()
        return entry

    def _update_account(self, account: str, now: float) -> None:
        for feature in self.policy.costs:
            key = Key(account, feature)
            entry = self.entries.get(key)
            if entry is not None:
                self._update(key, entry, now)

    def _update(self, key: Key, entry: Entry, now: float) -> None:
        if not entry.known:
            return
        decision = self._decision(key, entry, now)
        if decision is None:
            return
        counters = sum(entry.counters.values()) + self._ahead_of(key, entry, now)
        if entry.shown is None or _differs(entry.shown, decision, counters - entry.shown_counters):
            entry.shown, entry.shown_counters = decision, counters
            self.changes.note(key)

    def sent(self, key: Key, decision: Decision, now: float) -> None:
        """Note what a Kong is sent: its ceiling can be higher than that of the change which is the reason."""
        entry = self.entries[key]
        shown, counters = entry.shown, sum(entry.counters.values()) + self._ahead_of(key, entry, now)
        if shown is None or shown.left is None or decision.left is None:
            return
        if decision.left + counters > shown.left + entry.shown_counters:
            entry.shown, entry.shown_counters = decision, counters

    def _bound_tombstones(self) -> None:
        live = len(self.subjects) + len(self.entries)
        surplus = len(self.changes) - live - _MAX_TOMBSTONES
        if surplus > 0:
            self.changes.forget_oldest(surplus + _MAX_TOMBSTONES // 2, self._is_live)

    def _is_live(self, what: str | Key) -> bool:
        return what in self.entries if isinstance(what, Key) else what in self.subjects

    def saved(self, now: float) -> dict[str, Any]:
        """Return the state for the disk without its entries, with ages instead of times."""
        return {
            "subjects": dict(self.subjects),
            "kongs": sorted(self.kongs),
            "lots": self.lots.saved(now),
        }

    def saved_entries(self, now: float) -> Iterator[list[Any]]:
        """Yield the entries of this moment. What is counted meanwhile would be in some and not in others."""
        for key, entry in list(self.entries.items()):
            yield [
                *key,
                entry.reason,
                _age(entry.access_at, now),
                entry.balance,
                _age(entry.balance_at, now),
                entry.quota,
                entry.reset,
                list(entry.counts.items()),
                entry.counters,
                None if entry.reservations is None else entry.reservations.saved(now),
            ]

    def restore(self, saved: Mapping[str, Any], now: float) -> None:
        """Take the state of an earlier process."""
        self._restored = True
        self.lots.restore(saved["lots"], now)
        for subject, account in saved["subjects"].items():
            self.assign(subject, account, now)
        self.kongs = set(saved["kongs"])
        for account, feature, *rest in saved["entries"]:
            reason, access, balance, balanced, quota, reset, counts, counters, reservations = rest
            if feature not in self.policy.costs:
                continue
            key = Key(account, feature)
            entry = self._entry(key)
            entry.reason = None if reason is None else Reason(reason)
            entry.access_at, entry.balance_at = _time(access, now), _time(balanced, now)
            entry.balance, entry.quota, entry.reset = balance, quota, reset
            entry.counts = dict(counts)
            entry.counters = counters
            if reservations is not None:
                entry.reservations = Reservations.restored(reservations, now)
                self._reserving.add(key)
            self._update(key, entry, now)

    def used_lots(self) -> Iterator[int]:
        """Yield the lots that some count refers to."""
        for entry in self.entries.values():
            yield from entry.counts


def _differs(shown: Decision, decision: Decision, passed: float) -> bool:
    """Return whether a decision is another one for Kong, which counted what passed since on its own."""
    if shown.reason is not decision.reason or (shown.left is None) != (decision.left is None):
        return True
    if shown.left is None or decision.left is None:
        return shown.reset != decision.reset
    too_high = shown.left - (decision.left + passed)
    if too_high > 0 and decision.left < _EXACT:
        return True
    return abs(too_high) > decision.left / _SLACK


def _age(moment: float, now: float) -> float | None:
    return None if moment == float("-inf") else now - moment


def _time(age: float | None, now: float) -> float:
    return float("-inf") if age is None else now - age
