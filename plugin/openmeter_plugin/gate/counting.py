"""Reads from the spool what the plugin accepts, and from the books what of it is delivered."""

from __future__ import annotations

import math
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from openmeter_plugin.books.read_models import SpoolError, all_positions, reading
from openmeter_plugin.gate.accounts import Accounts
from openmeter_plugin.gate.counts import Segment
from openmeter_plugin.gate.settings import Feature, Unit
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory
from openmeter_plugin.spool.reader import Chunk, Position, read_chunks, segment_names
from openmeter_plugin.spool.segment import MAGIC, decode_usage_key

_MAX_RECORDS: Final = 20_000
"""Of one step: what a gateway of 100,000 requests/s writes in 0.2 s. The rest waits for the next step."""
_REQUEST: Final = "kong.api_request"


class _Event(msgspec.Struct):
    type: str
    subject: str
    data: dict[str, Any] | None = None


_decode: Final = msgspec.json.Decoder(list[_Event]).decode


class Amounts:
    """What a record uses of each feature, by the unit of the feature's meter."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self._units = [(feature.key, unit) for feature in features if (unit := feature.unit) is not None]
        # The summary of a record has its events' types: enough where only requests are counted.
        plain = [(key, unit) for key, unit in self._units if unit.event == _REQUEST]
        self._request: dict[str, float] | None = None
        if all(unit.value is None and not unit.where for _, unit in plain):
            self._request = {key: 1.0 for key, _ in plain}

    def of(self, usage_key: bytes, events: bytes) -> tuple[str, Mapping[str, float]] | None:
        """Return the subject and the amounts of a record."""
        if usage_key and self._request is not None:
            summary = decode_usage_key(usage_key)
            if summary.types == (_REQUEST,):
                return summary.subject, self._request
        try:
            decoded = _decode(b"[" + events + b"]")
        except msgspec.DecodeError:
            return None
        amounts: Counter[str] = Counter()
        for event in decoded:
            for key, unit in self._units:
                if event.type == unit.event:
                    amounts[key] += _amount(unit, event.data or {})  # type: ignore[assignment]
        return (decoded[0].subject, amounts) if decoded else None


def _amount(unit: Unit, data: Mapping[str, Any]) -> float:
    if any(str(data.get(name)) != value for name, value in unit.where.items()):
        return 0.0
    if unit.value is None:
        return 1.0
    value = data.get(unit.value)
    try:
        amount = float(value) if not isinstance(value, bool) and value is not None else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return amount if 0 < amount < math.inf else 0.0


class SpoolTail:
    """Follows all queues of a spool, from where the books have delivered to, or from a saved position."""

    def __init__(self, spool: Path, features: Sequence[Feature]) -> None:
        self._spool = spool
        self._amounts = Amounts(features)
        self.positions: dict[Segment, int] = {}
        self.delivered: dict[Segment, int] = {}
        self._limit = RateLimit()
        self.records = 0

    def begin(self) -> None:
        """Begin behind what is delivered: the metering API has counted that, or will before long."""
        self.read_delivered()
        for segment, offset in self.delivered.items():
            self.positions.setdefault(segment, offset)

    def read_delivered(self) -> None:
        """Read from the books how far each segment is delivered."""
        try:
            with reading(self._spool) as db:
                positions = all_positions(db)
        except (SpoolError, sqlite3.Error, OSError) as error:
            if self._limit.passes():
                get_logger().warning("gate_books_unreadable", reason=str(error))
            return
        self.delivered = dict(_flat(positions))

    def is_delivered(self, segment: Segment, offset: int) -> bool:
        """Return whether a segment is delivered up to an offset; one that is gone was."""
        delivered = self.delivered.get(segment)
        if delivered is None:
            return not (queues_directory(self._spool) / segment.queue / segment.name).exists()
        return delivered >= offset

    def step(self, accounts: Accounts, seen: Callable[[str, float], None], now: float) -> int:
        """Count what was written since the last step, up to a limit; returns the number of records."""
        total = 0
        for segment, path in self._grown():
            used: dict[str, tuple[dict[str, float], int]] = {}
            for chunk in read_chunks(path, self.positions.get(segment, 0)):
                total += self._add(chunk, used)
                self.positions[segment] = chunk.end
                if total >= _MAX_RECORDS:
                    break
            if used:
                lot = accounts.lots.current(now)
                accounts.lots.ends_at(lot, segment, self.positions[segment])
                for subject, (amounts, requests) in used.items():
                    seen(subject, now)
                    accounts.count(accounts.account_of(subject), amounts, requests, lot, now)
            if total >= _MAX_RECORDS:
                break
        self.records += total
        return total

    def _add(self, chunk: Chunk, used: dict[str, tuple[dict[str, float], int]]) -> int:
        for usage_key, events in zip(chunk.usage_keys, chunk.events, strict=True):
            found = self._amounts.of(usage_key, events)
            if found is None:
                continue
            subject, amounts = found
            sums, requests = used.get(subject, ({}, 0))
            for feature, amount in amounts.items():
                sums[feature] = sums.get(feature, 0.0) + amount
            used[subject] = sums, requests + 1
        return chunk.records

    def _grown(self) -> Iterator[tuple[Segment, Path]]:
        """Yield the segments with something new, and forget those that are gone."""
        found: set[Segment] = set()
        directory = queues_directory(self._spool)
        try:
            queues = [queue for queue in os.listdir(directory) if queue != QUARANTINE]  # noqa: PTH208
        except OSError:
            return
        for queue in queues:
            for name in sorted(segment_names(directory / queue)):
                segment, path = Segment(queue, name), directory / queue / name
                found.add(segment)
                try:
                    size = path.stat().st_size
                except OSError:
                    continue
                if size > max(self.positions.get(segment, 0), len(MAGIC)):
                    yield segment, path
        for segment in self.positions.keys() - found:
            del self.positions[segment]


def _flat(positions: Mapping[str, Mapping[str, Position]]) -> Iterator[tuple[Segment, int]]:
    for queue, segments in positions.items():
        for name, position in segments.items():
            yield Segment(queue, name), position.delivered
