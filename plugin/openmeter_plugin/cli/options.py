"""What commands make of the texts of their options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from openmeter_plugin.delivery.options import DeliveryOptions, Retention
from openmeter_plugin.log import get_logger
from openmeter_plugin.units import duration, size

_Quantity = TypeVar("_Quantity")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print a sentence on standard error and exit."""
    sys.stderr.write(f"openmeter-plugin: {message}\n")
    sys.exit(status)


def delivery_options(
    spool: Path,
    retention: str,
    retention_size: str,
    max_age: str | None,
    token_file: Path | None,
    ledger_days: int,
) -> DeliveryOptions:
    """Return how to deliver; ends with a sentence where an option has a value that cannot be."""
    kept = Retention(
        quantity(duration, retention, "--retention"), quantity(size, retention_size, "--retention-size")
    )
    age = quantity(duration, max_age, "--max-age") if max_age else None
    if token_file is not None and not token_file.is_file():
        # Not the end: what Kong hands over is kept until somebody has mended it.
        get_logger().critical(
            "token_file_missing",
            file=str(token_file),
            consequence="nothing is delivered, the events wait in the spool",
            remedy="put the token there, or start with the right --token-file",
        )
    return DeliveryOptions(spool, kept, token_file, age, ledger_days=ledger_days)


def quantity(parse: Callable[[str], _Quantity], text: str, option: str) -> _Quantity:
    """Return what an option's text comes to; a text that `parse` raises ValueError for is a usage error."""
    try:
        return parse(text)
    except ValueError as error:
        fail(f"{option}: {error}", os.EX_USAGE)
