"""Making events of requests that were set aside, once the configuration that had no place for them is mended.

They enter the books as dead letters that are to be sent again: so they are there, counted and kept, from
the same moment on at which they leave the quarantine, and the delivery sends them as it sends those.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.database import FILE, transaction
from openmeter_plugin.books.ledger_lines import ledger_key
from openmeter_plugin.books.replay import writing
from openmeter_plugin.books.store import Counts, Lines, add_counts, add_to_ledger
from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.instances.instance import destination_of
from openmeter_plugin.metering.lenient_json import encode_json, table
from openmeter_plugin.metering.quarantine import replay_record
from openmeter_plugin.metering.rules import Rules, SkipReason
from openmeter_plugin.spool.destination import QUARANTINE, Destination, queues_directory, write_destination

_PER_TRANSACTION: Final = 500  # records, so that the delivery need not wait long
_ANSWER: Final = "not sent yet: it was set aside because of "


@dataclass(slots=True)
class QuarantineReplay:
    """What became of the records: requests metered and skipped, the events of the former, and the rest."""

    metered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    events: int = 0
    left: int = 0


def replay_quarantine(
    spool: Path, config: dict[str, Any], ids: Collection[int] | None = None
) -> QuarantineReplay:
    """Replay the quarantine's records, all or those with these ids, under the configuration.

    `config` is the plugin's, as Kong passes it; where it names no plugin, events of requests whose own
    destination is not known go to a queue of their own. Raises ConfigError, sqlite3.Error, OSError.
    A request that still nobody is found for stays, unless `subject.missing` says outright what is to be done.
    """
    parsed, rules = parse_config(config)
    if table(config.get("subject")).get("missing") is None:
        rules = replace(rules, missing="quarantine")  # by default it would be skipped, for good
    result = QuarantineReplay()
    if not (spool / FILE).exists():
        return result
    replay = _Replay(spool, rules, destination_of(config, parsed), result)
    after = 0
    with writing(spool) as db:
        while True:
            with transaction(db):
                rows = db.execute(
                    "SELECT id, record FROM quarantine WHERE id > ? ORDER BY id LIMIT ?",
                    (after, _PER_TRANSACTION),
                ).fetchall()
                replay.enter(db, [row for row in rows if ids is None or row[0] in ids])
            if not rows:
                return result
            after = rows[-1][0]


class _Replay:
    def __init__(self, spool: Path, rules: Rules, destination: Destination, result: QuarantineReplay) -> None:
        self._spool = spool
        self._rules = rules
        self._destination = destination
        self._result = result

    def enter(self, db: sqlite3.Connection, rows: list[tuple[int, bytes]]) -> None:
        """Enter what becomes of the records, of all that is counted and kept at once."""
        result = self._result
        gone: list[int] = []
        counts: Counts = Counter()
        letters: list[tuple[str, bytes, str]] = []
        lines: dict[str, Lines] = {}
        for number, raw in rows:
            record = table(orjson.loads(raw))
            made = replay_record(record, self._rules)
            if isinstance(made, list):
                queue = self._queue_of(record)
                for event in made:
                    letters.append((queue, encode_json(event), f"{_ANSWER}{record.get('reason')}"))
                    lines.setdefault(queue, Counter())[ledger_key(event)] += 1
                counts["metered", ""] += 1
                result.metered += 1
            elif isinstance(made, SkipReason):
                counts["skipped", str(made)] += 1
                result.skipped[str(made)] += 1
            else:
                result.left += 1
                continue
            gone.append(number)
        counts["quarantined", ""] -= len(gone)
        result.events += len(letters)
        add_counts(db, QUARANTINE, counts)
        for queue, accepted in lines.items():
            total = accepted.total()
            add_counts(db, queue, Counter({("events", ""): total, ("dead_lettered", ""): total}))
            add_to_ledger(db, queue, "accepted", accepted)
            add_to_ledger(db, queue, "dead_lettered", accepted)
        now = time.time()
        db.executemany(
            "INSERT INTO dead_letters (queue, event, status, answer, at, replay)"
            " VALUES (?, ?, NULL, ?, ?, 1)",
            [(*letter, now) for letter in letters],
        )
        db.executemany("DELETE FROM quarantine WHERE id = ?", [(number,) for number in gone])

    def _queue_of(self, record: Any) -> str:
        """Return the queue that the request's events go to, described so that delivery knows it."""
        own = record.get("destination")
        if isinstance(own, str) and _is_described(self._spool, own):
            return own
        destination = self._destination
        if not _is_described(self._spool, destination.id):
            write_destination(self._spool, destination, keep_token=TOKEN_VARIABLE not in os.environ)
        return destination.id


def _is_described(spool: Path, queue: str) -> bool:
    return (queues_directory(spool) / queue / "destination.json").is_file()
