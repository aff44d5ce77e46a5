"""Parsing of option values, and the error exit that the commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from openmeter_plugin.delivery.options import DeliveryOptions, Retention
from openmeter_plugin.log import get_logger
from openmeter_plugin.units import duration, size

_Value = TypeVar("_Value")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error message on standard error and exit."""
    sys.stderr.write(f"openmeter-plugin: {message}\n")
    sys.exit(status)


def refuse_empty_arguments(arguments: Sequence[str]) -> None:
    """End the process if an argument is empty, as after a failing `$(...)`: `--spool=` is not this folder."""
    for before, word in zip(("", *arguments), arguments, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            what = name or (before if before.startswith("--") else "an argument")
            fail(f"{what}: is empty; a $(...) or variable in the command has probably failed", os.EX_USAGE)


def delivery_options(
    spool: Path,
    retention: str,
    retention_size: str,
    max_age: str | None,
    token_file: Path | None,
    ledger_days: int,
) -> DeliveryOptions:
    """Return the delivery options; an invalid value ends the process with a message."""
    kept_events = Retention(
        parse_option(duration, retention, "--retention"),
        parse_option(size, retention_size, "--retention-size"),
    )
    age = parse_option(duration, max_age, "--max-age") if max_age else None
    if token_file is not None and not token_file.is_file():
        # Not fatal: the spool keeps what Kong hands over until the operator provides the file.
        get_logger().critical(
            "token_file_missing",
            file=str(token_file),
            consequence="no events are delivered; they wait in the spool",
            remedy="put the token there, or restart with the right --token-file",
        )
    return DeliveryOptions(spool, kept_events, token_file, age, ledger_days=ledger_days)


def parse_option(parse: Callable[[str], _Value], text: str, option: str) -> _Value:
    """Parse an option's text; a ValueError of `parse` becomes a usage error."""
    try:
        return parse(text)
    except ValueError as error:
        fail(f"{option}: {error}", os.EX_USAGE)
