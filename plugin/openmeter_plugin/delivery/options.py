"""Options of delivery: destination overrides, age limit, retention of delivered segments, ledger pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_TOKEN"  # noqa: S105 - the name of one, not one
"""The environment variable that overrides every destination's token, as a token file does."""

DEFAULT_RETENTION: Final = timedelta(days=1)
DEFAULT_RETENTION_BYTES: Final = 1024**3
DEFAULT_LEDGER_DAYS: Final = 400
"""More than a year, so that the ledger can settle a dispute about a yearly invoice."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Delivered segments are removed once they are older than `age`, or together larger than `size` bytes."""

    age: timedelta = DEFAULT_RETENTION
    size: int = DEFAULT_RETENTION_BYTES


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """How to deliver a spool.

    `token_file` overrides every destination's token, and `endpoint` every destination's address. Undelivered
    events older than `max_age` become dead letters. Settled ledger lines are pruned after `ledger_days`;
    with 0 they are never pruned.
    """

    spool: Path
    retention: Retention = field(default_factory=Retention)
    token_file: Path | None = None
    max_age: timedelta | None = None
    endpoint: str | None = None
    ledger_days: int = DEFAULT_LEDGER_DAYS
