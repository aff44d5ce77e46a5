"""How to deliver, and how long delivered segments stay for what the metering API may have lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_TOKEN"  # noqa: S105 - the name of one, not one
"""The environment variable that takes the place of every destination's token; so does a token file."""

DEFAULT_RETENTION: Final = timedelta(days=1)
DEFAULT_RETENTION_BYTES: Final = 1024**3
DEFAULT_LEDGER_DAYS: Final = 400
"""More than a year: a yearly invoice can be disputed with the ledger at hand."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Delivered segments are removed when they are older than `age`, or together larger than `size` bytes."""

    age: timedelta = DEFAULT_RETENTION
    size: int = DEFAULT_RETENTION_BYTES


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """How to deliver a spool.

    A `token_file` takes the place of every destination's token. `max_age` makes dead letters of events
    that are older and still not delivered. All goes to `endpoint` where there is one. Settled lines of the
    ledger are pruned when they are older than `ledger_days`, with 0 never.
    """

    spool: Path
    retention: Retention = field(default_factory=Retention)
    token_file: Path | None = None
    max_age: timedelta | None = None
    endpoint: str | None = None
    ledger_days: int = DEFAULT_LEDGER_DAYS
