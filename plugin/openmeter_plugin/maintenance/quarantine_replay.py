"""Replay of the quarantine: makes events of quarantined requests under a corrected configuration.

The events enter the books as dead letters that are marked for replay, in the transaction in which their
requests leave the quarantine. So they are counted and kept at any moment, and the delivery process posts
them like any other replay.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.database import FILE, transaction
from openmeter_plugin.books.ledger_lines import gap_of, ledger_key
from openmeter_plugin.books.replay import ReplayedRequests, quarantined, replay_quarantined, writing
from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.instances.instance import destination_of
from openmeter_plugin.metering.lenient_json import encode_json, json_object
from openmeter_plugin.metering.quarantine import replay_record
from openmeter_plugin.metering.rules import Rules, SkipReason
from openmeter_plugin.spool.destination import (
    QUARANTINE,
    Destination,
    is_described,
    queues_directory,
    write_destination,
)

_TRANSACTION_SIZE: Final = 500  # records; small, so that the delivery process does not wait long
_ANSWER: Final = "not sent yet: it was in quarantine because of "


@dataclass(slots=True)
class QuarantineReplay:
    """Result of a replay: requests metered and skipped, events made, and requests left in quarantine."""

    metered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    events: int = 0
    left: int = 0


def replay_quarantine(
    spool: Path,
    config: dict[str, Any],
    ids: Collection[int] | None = None,
    *,
    transaction_size: int = _TRANSACTION_SIZE,
) -> QuarantineReplay:
    """Replay the quarantine's records, all or those with these ids, under the configuration.

    `config` is the plugin's configuration as Kong passes it. If it names no plugin, events of requests whose
    own destination is not known go to a separate queue. Raises ConfigError, sqlite3.Error, OSError.
    A request that still has no subject stays, unless `subject.missing` is set explicitly.
    """
    parsed, rules = parse_config(config)
    if json_object(config.get("subject")).get("missing") is None:
        rules = replace(rules, missing="quarantine")  # the default would skip it for good
    result = QuarantineReplay()
    if not (spool / FILE).exists():
        return result
    replay = _Replay(spool, rules, destination_of(config, parsed), result)
    after = 0
    with writing(spool) as db:
        while True:
            with transaction(db):
                rows = quarantined(db, after, transaction_size)
                replay_quarantined(db, replay.decide([row for row in rows if ids is None or row[0] in ids]))
            if not rows:
                return result
            after = rows[-1][0]


class _Replay:
    def __init__(self, spool: Path, rules: Rules, destination: Destination, result: QuarantineReplay) -> None:
        self._spool = spool
        self._rules = rules
        self._destination = destination
        self._result = result

    def decide(self, rows: list[tuple[int, bytes]]) -> ReplayedRequests:
        """Make the events of some records."""
        result, replayed = self._result, ReplayedRequests()
        for number, raw in rows:
            record = json_object(orjson.loads(raw))
            decision = replay_record(record, self._rules)
            if isinstance(decision, list):
                queue = self._queue_of(record)
                if gap := gap_of(decision):
                    replayed.gaps[queue, gap] += 1
                for event in decision:
                    replayed.events.append(
                        (queue, ledger_key(event), encode_json(event), f"{_ANSWER}{record.get('reason')}")
                    )
                result.metered += 1
            elif isinstance(decision, SkipReason):
                replayed.skipped[str(decision)] += 1
                if decision is SkipReason.AI_STATISTICS_OFF:
                    replayed.gaps[QUARANTINE, str(decision)] += 1
                result.skipped[str(decision)] += 1
            else:
                result.left += 1
                continue
            replayed.ids.append(number)
        result.events += len(replayed.events)
        return replayed

    def _queue_of(self, record: Any) -> str:
        """Return the queue for the request's events; writes its destination file if there is none."""
        own = record.get("destination")
        if isinstance(own, str) and _has_destination(self._spool, own):
            return own
        destination = self._destination
        if not _has_destination(self._spool, destination.id):
            write_destination(self._spool, destination, keep_token=TOKEN_VARIABLE not in os.environ)
        return destination.id


def _has_destination(spool: Path, queue: str) -> bool:
    return is_described(queues_directory(spool) / queue)
