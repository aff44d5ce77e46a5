"""Parsing of option values, and the error exit that the commands share."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, NoReturn, TypeVar

import typer

from openmeter_plugin.delivery.options import DeliveryOptions, Network, Retention, in_words
from openmeter_plugin.foreign import printable
from openmeter_plugin.log import get_logger
from openmeter_plugin.network.tls import Tls
from openmeter_plugin.units import duration, size

_Value = TypeVar("_Value")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error message on standard error and exit."""
    sys.stderr.write(f"openmeter-plugin: {printable(message)}\n")
    sys.exit(status)


class Output(StrEnum):
    """What a command prints."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="What to print.")]

_NAMES: Final = (
    "ADMIN_TOKEN API_TOKEN CA_FILE CLIENT_CERT CLIENT_KEY HTTP_LOG_SECRET PROXY SEGMENTS SPOOL TOKEN"
)
_VARIABLES: Final = frozenset(f"OPENMETER_PLUGIN_{name}" for name in _NAMES.split())
# Kubernetes and Docker set these in each container for a service `openmeter-plugin` beside it.
_OF_SERVICES: Final = re.compile(r".*_(?:SERVICE_(?:HOST|PORT)|PORT)(?:_.*)?")


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Log each variable that is named like a setting but is none: it would be ignored silently.

    A warning, because a gateway must start whatever its environment holds.
    """
    for name in sorted(environment):
        if not name.startswith("OPENMETER_PLUGIN_") or name in _VARIABLES or _OF_SERVICES.fullmatch(name):
            continue
        close = difflib.get_close_matches(name, _VARIABLES, 1, 0.8)
        hint = {"remedy": f"did you mean {close[0]}?"} if close else {}
        get_logger().warning("unknown_variable", variable=name, consequence="it has no effect", **hint)


def refuse_empty_arguments(arguments: Sequence[str]) -> None:
    """End the process if an argument is empty, as after a failing `$(...)`: `--spool=` is not this folder."""
    for before, word in zip(("", *arguments), arguments, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            what = name or (before if before.startswith("--") else "an argument")
            fail(f"{what}: is empty; a $(...) or variable in the command has probably failed", os.EX_USAGE)


CaFileOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="OPENMETER_PLUGIN_CA_FILE",
        help="PEM file with the authorities to trust for the metering API, instead of the public ones.",
    ),
]
ClientCertOption = Annotated[
    Path | None,
    typer.Option(
        "--client-cert",
        envvar="OPENMETER_PLUGIN_CLIENT_CERT",
        help="PEM file with the certificate to identify with; may hold its key, too.",
    ),
]
ClientKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--client-key",
        envvar="OPENMETER_PLUGIN_CLIENT_KEY",
        help="PEM file with the key of --client-cert, without a password.",
    ),
]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        envvar="OPENMETER_PLUGIN_PROXY",
        help="URL of the proxy to the metering API (default: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)."
        " Loopback and link-local addresses never pass a proxy.",
    ),
]


def network_options(
    ca_file: Path | None, client_cert: Path | None, client_key: Path | None, proxy: str | None
) -> Network:
    """Return how to reach the metering API. A combination that can never work ends the process."""
    if client_key is not None and client_cert is None:
        fail("--client-key: needs --client-cert", os.EX_USAGE)
    network = Network(Tls(ca_file, client_cert, client_key), proxy)
    if proxy is not None:
        try:
            network.proxy_for("https", "metering.example", None)
        except ValueError as error:
            fail(str(error), os.EX_USAGE)
    return network


def delivery_options(
    spool: Path,
    retention: str,
    retention_size: str,
    max_age: str | None,
    token_file: Path | None,
    ledger_days: int,
    network: Network,
) -> DeliveryOptions:
    """Return the delivery options; an invalid value ends the process with a message."""
    kept_events = Retention(
        parse_option(duration, retention, "--retention"),
        parse_option(size, retention_size, "--retention-size"),
    )
    age = parse_option(duration, max_age, "--max-age") if max_age else None
    options = DeliveryOptions(spool, kept_events, token_file, age, ledger_days=ledger_days, network=network)
    for fault in faults_of(options):
        # Not fatal: the spool keeps what Kong hands over until the operator has corrected it.
        get_logger().critical(
            "delivery_cannot_start",
            reason=fault,
            consequence="no events are delivered; they wait in the spool",
            remedy="correct it; a file is read again, for anything else restart",
        )
    return options


def faults_of(options: DeliveryOptions) -> list[str]:
    """Return what is wrong with token, certificates and proxy, by the name of the setting, without values."""
    found = []
    for check in (options.token, options.network.check):
        try:
            check()
        except (OSError, ValueError) as error:
            found.append(in_words(error))
    return found


def parse_option(parse: Callable[[str], _Value], text: str, option: str) -> _Value:
    """Parse an option's text; a ValueError of `parse` becomes a usage error."""
    try:
        return parse(text)
    except ValueError as error:
        fail(f"{option}: {error}", os.EX_USAGE)
