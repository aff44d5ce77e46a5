"""The running gate: asks, counts, persists, and decides for Kong. One event loop, one instance per spool."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin import __version__
from openmeter_plugin.gate.accounts import Accounts, Key, Reading, Reason
from openmeter_plugin.gate.client import MAX_CONNECTIONS, Access, AccessClient, ApiError
from openmeter_plugin.gate.counting import SpoolTail
from openmeter_plugin.gate.counts import Lots, Segment
from openmeter_plugin.gate.kongs import Kongs
from openmeter_plugin.gate.overrides import Override, Overrides
from openmeter_plugin.gate.schedule import Call, Query, Schedule
from openmeter_plugin.gate.settings import Settings
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import write_atomically

DIRECTORY: Final = "gate"
"""Within the spool: the state, and the overrides."""
_TICK: Final = 0.05
_COUNT_SECONDS: Final = 0.1
_DELIVERED_SECONDS: Final = 0.5
_EXPIRE_SECONDS: Final = 1.0
_SAVE_SECONDS: Final = 5.0
_TIDY_SECONDS: Final = 30.0
_RESET_AGAIN: Final = 60.0
_STATE: Final = "state-1.json"
_UNLIMITED_ENDS_IN: Final = 1500.0
_PIECE: Final = 500
"""Entries that are written at once: a millisecond."""


class Gate:
    """All parts of the gate, and the loops that run them."""

    def __init__(self, settings: Settings, spool: Path) -> None:
        self.settings = settings
        self.accounts = Accounts(settings.policy, Lots(settings.counted_after))
        self.schedule = Schedule(settings.pace)
        self.tail = SpoolTail(spool, settings.features)
        self.client = AccessClient(settings, self.schedule.spend)
        self.directory = spool / DIRECTORY
        self.overrides = Overrides(self.directory / "overrides.json")
        self.kongs = Kongs(self.accounts, settings.lines(__version__), self.schedule.seen)
        self.overshoot: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.last_answer: float | None = None
        self.last_error = ""
        self._counting = asyncio.Lock()
        self._limit = RateLimit()
        self._resets: dict[Key, tuple[float, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # The loops

    async def run(self) -> None:
        """Ask, count and persist until cancelled."""
        self.restore()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._ask_loop())
                group.create_task(self._count_loop())
                group.create_task(self._regular_loop())
        finally:
            for task in self._tasks:
                task.cancel()
            with contextlib.suppress(OSError):
                self.save()
            await self.client.close()

    async def _ask_loop(self) -> None:
        while True:
            for call in self.schedule.calls(time.monotonic(), MAX_CONNECTIONS - len(self._tasks)):
                task = asyncio.create_task(self.ask(call))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(_TICK)

    async def _count_loop(self) -> None:
        while True:
            async with self._counting:
                self.count()
            await asyncio.sleep(_COUNT_SECONDS)

    def count(self) -> None:
        """Count what the plugin has accepted since the last call."""
        if self.tail.step(self.accounts, self.schedule.seen, time.monotonic()):
            self.kongs.wake()
        self.accounts.expire_ahead(time.monotonic())

    async def _regular_loop(self) -> None:
        due = dict.fromkeys((_DELIVERED_SECONDS, _EXPIRE_SECONDS, _SAVE_SECONDS, _TIDY_SECONDS), 0.0)
        while True:
            now = time.monotonic()
            ready = {every for every, moment in due.items() if moment <= now}
            due |= {every: now + every for every in ready}
            if _DELIVERED_SECONDS in ready:
                await asyncio.to_thread(self.tail.read_delivered)
                self.accounts.lots.note_delivered(self.tail.is_delivered, time.monotonic())
            if _EXPIRE_SECONDS in ready:
                self.expire()
            if _SAVE_SECONDS in ready:
                await self._save_in_pieces()
            if _TIDY_SECONDS in ready:
                self._tidy(now)
            self.kongs.wake()
            await asyncio.sleep(_DELIVERED_SECONDS / 2)

    def expire(self) -> None:
        """End what has an end: reservations, overrides, the freshness of readings."""
        now = time.monotonic()
        for override in self.overrides.ended(time.time()):
            self._override(self.accounts.account_of(override.subject))
        self.accounts.expire(now)
        self.accounts.check_stale(now)

    def _tidy(self, now: float) -> None:
        for subject in self.schedule.idle(now, lambda subject: self.accounts.has_uncounted(subject, now)):
            self.accounts.forget(subject)
        self._resets = {key: known for key, known in self._resets.items() if key in self.accounts.entries}
        self.accounts.lots.forget(self.accounts.used_lots())
        self.kongs.tidy(now)

    # Questions

    async def ask(self, call: Call) -> None:
        """Make a call and take its answer; a failure is logged, counted and repeated later."""
        asked = time.monotonic()
        try:
            if isinstance(call, Query):
                answers = await self.client.access(call.subjects)
                if answers is None:
                    self.schedule.ask_one_by_one(call.subjects)
                    return
                self._take_access(answers)
                self.schedule.known(call.subjects, asked)
            else:
                readings = await self.client.balances(call.account)
                await self._take_balances(call.account, readings, asked)
            self.last_answer = time.monotonic()
        except ApiError as error:
            self._failed(call, error)
        except Exception as error:  # an answer of another shape
            self._failed(call, ApiError("failed", f"{type(error).__name__}: is metering.url right?"))
        self.kongs.wake()

    def _failed(self, call: Call, error: ApiError) -> None:
        now = time.monotonic()
        self.errors[error.kind] += 1
        self.last_error = str(error)
        if error.kind == "too_many_requests":
            self.schedule.refused(now, error.retry_after)
        self.schedule.failed(call, now)
        if self._limit.passes():
            get_logger().error("gate_call_failed", kind=error.kind, reason=str(error))

    def _take_access(self, answers: list[Access]) -> None:
        now = time.monotonic()
        for answer in answers:
            account, before = answer.account or answer.subject, self.accounts.account_of(answer.subject)
            self.accounts.assign(answer.subject, account, now)
            for feature, reading in answer.readings.items():
                self.accounts.apply(Key(account, feature), reading, now)
            if self.overrides.get(answer.subject) is not None and account != before:
                self._override(before)
                self._override(account)
            if answer.account is not None and any(
                self.accounts.needs_number(Key(account, feature.key)) for feature in self.settings.features
            ):
                self.schedule.wants_balance(account)

    async def _take_balances(
        self, account: str, readings: Mapping[str, Reading] | None, asked: float
    ) -> None:
        if not self.client.has_numbers and self.accounts.policy.has_numbers:
            self._go_on_without_numbers()
        if readings is None:
            self.schedule.forget_balance(account)
            return
        now = time.monotonic()
        ends_in = _UNLIMITED_ENDS_IN
        for feature, reading in readings.items():
            key = Key(account, feature)
            entry = self.accounts.entries.get(key)
            before = (entry.balance, entry.balance_at) if entry is not None else (None, 0.0)
            reset = await self._reset(key, reading)
            exact = Reading(reading.at, reading.reason, True, reading.balance, reading.quota, reset)
            self.accounts.apply(key, exact, now)
            self._note_overshoot(key, exact)
            ends_in = min(ends_in, _ends_in(before, exact))
        self.schedule.balance_read(account, asked, ends_in)

    def _go_on_without_numbers(self) -> None:
        get_logger().warning(
            "gate_without_balances",
            reason="the metering API has no endpoint for them",
            consequence="access alone decides, so usage between two readings is not taken off",
        )
        self.accounts.give_up_numbers(time.monotonic())

    async def _reset(self, key: Key, reading: Reading) -> float:
        """Return when a used-up allowance is renewed; asked for once a minute at most."""
        if reading.reason is not Reason.USAGE_LIMIT_REACHED or not self.client.has_resets:
            return 0.0
        now = time.time()
        known, asked = self._resets.get(key, (0.0, 0.0))
        if now - asked < _RESET_AGAIN:
            return known if known > now else 0.0
        try:
            found = await self.client.reset(key.account, key.feature)
        except ApiError:
            found = 0.0  # Retry-After is a courtesy
        self._resets[key] = found, now
        return found

    def _note_overshoot(self, key: Key, reading: Reading) -> None:
        if reading.balance == 0:
            entry = self.accounts.entries[key]
            left = self.accounts.left(entry)
            if left is not None and left < 0:
                self.overshoot[key.feature] = max(self.overshoot[key.feature], round(-left))

    # Overrides

    def allow(self, subject: str, seconds: float, why: str, by: str) -> Override:
        """Allow a subject everything for a time, persisted before it takes effect; raises OSError."""
        override = Override(subject, time.time() + seconds, why, by, time.time())
        self.overrides.put(override)
        self.schedule.seen(subject, time.monotonic())
        self._override(self.accounts.account_of(subject))
        get_logger().warning("gate_override", subject=subject, seconds=round(seconds), why=why, by=by)
        self.kongs.wake()
        return override

    def end_override(self, subject: str) -> bool:
        """End an override; returns whether there was one."""
        if not self.overrides.remove(subject):
            return False
        self._override(self.accounts.account_of(subject))
        get_logger().warning("gate_override_ended", subject=subject)
        self.kongs.wake()
        return True

    def _override(self, account: str) -> None:
        """Allow an account everything until the last override of its subjects ends, if it has any."""
        account_of = self.accounts.account_of
        ends = [it.until for it in self.overrides.all() if account_of(it.subject) == account]
        now = time.monotonic()
        self.accounts.override(account, now + max(ends, default=0.0) - time.time(), now)

    # The state on disk

    def restore(self) -> None:
        """Take the state of an earlier process, so that it is served at once; without one, start empty."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.overrides.load()
        now = time.monotonic()
        try:
            saved = orjson.loads((self.directory / _STATE).read_bytes())
            gone = max(0.0, time.time() - saved["saved_at"])
            self.accounts.restore(saved["accounts"], now - gone)
            self.tail.positions = {Segment(queue, name): end for queue, name, end in saved["positions"]}
            for subject in self.accounts.subjects:
                self.schedule.seen(subject, now)
        except FileNotFoundError:
            self.tail.begin()
        except (OSError, ValueError, KeyError, TypeError) as error:
            get_logger().error("gate_state_unreadable", reason=str(error), consequence="it starts without it")
            self.accounts = Accounts(self.settings.policy, Lots(self.settings.counted_after))
            self.kongs.accounts = self.accounts
            self.tail.begin()
        for override in self.overrides.all():
            self.schedule.seen(override.subject, now)
            self._override(self.accounts.account_of(override.subject))

    def save(self) -> None:
        """Write the state for the next process, and the file that Kong reads after its own restart."""
        self._write(b"".join(self._state_pieces()), b"".join(self.kongs.state_file()))

    async def _save_in_pieces(self) -> None:
        """Save without holding the event loop for more than milliseconds; meanwhile nothing is counted."""
        async with self._counting:
            state = await _joined(self._state_pieces())
        feed = await _joined(self.kongs.state_file())
        try:
            await asyncio.to_thread(self._write, state, feed)
        except OSError as error:
            if self._limit.passes():
                get_logger().error("gate_state_not_written", reason=error.strerror)

    def _state_pieces(self) -> Iterator[bytes]:
        now = time.monotonic()
        head = {
            "saved_at": time.time(),
            "positions": [[*segment, end] for segment, end in self.tail.positions.items()],
        }
        entries = self.accounts.saved_entries(now)
        yield orjson.dumps(head | {"accounts": self.accounts.saved(now)})[:-2] + b',"entries":['
        separator = b""
        while piece := list(islice(entries, _PIECE)):
            yield separator + orjson.dumps(piece)[1:-1]
            separator = b","
        yield b"]}}"

    def _write(self, state: bytes, feed: bytes) -> None:
        write_atomically(self.directory / _STATE, state)
        path = self.settings.socket.with_name(f"{self.settings.socket.name}.state")
        write_atomically(path, feed)
        path.chmod(0o644)


async def _joined(pieces: Iterator[bytes]) -> bytes:
    """Join pieces, with the event loop's other work between them."""
    found = []
    for piece in pieces:
        found.append(piece)
        await asyncio.sleep(0)
    return b"".join(found)


def _ends_in(before: tuple[float | None, float], reading: Reading) -> float:
    """Return in how many seconds a balance is used up at the rate since the one before."""
    if reading.balance is None or reading.reason is not None:
        return _UNLIMITED_ENDS_IN
    balance, at = before
    if balance is None or at >= reading.at or balance <= reading.balance:
        return _UNLIMITED_ENDS_IN if balance is not None else 5.0
    rate = (balance - reading.balance) / (reading.at - at)
    return reading.balance / rate
