"""Final hours of a gateway's ledger, found by reading it before and after the meters. Pure.

The meters are read in between. So an hour can be compared if none of its events is waiting in the later
reading, and its lines equal those of the earlier one: then everything that the meters can contain was
delivered before they were read, and nothing arrived while they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from syncd.audit.compare import GatewayBooks, Line, Sent
from syncd.gateways.models import Ledger, LedgerLine, Spool

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class OtherDestination:
    """A destination whose events, as far as is known, do not go to the configured metering API."""

    gateway: str
    destination: str
    endpoint: str | None
    events: int

    def to_json(self) -> dict[str, object]:
        """Return it as in ``syncd audit --output json``."""
        return {
            "gateway": self.gateway,
            "destination": self.destination,
            "endpoint": self.endpoint,
            "events": self.events,
        }


def leads_to(endpoint: str | None, metering_url: str, other_hosts: Iterable[str] = ()) -> bool:
    """Return whether an endpoint is on the metering API's host and port, or on one of the other hosts.

    Another host without a port matches all of its ports.
    """
    if endpoint is None:
        return False
    there = _address(endpoint)
    if there is None:
        return False
    if there == _address(metering_url):
        return True
    hosts = (urlsplit(f"//{host}") for host in other_hosts)
    return any(there[0] == host.hostname and host.port in (None, there[1]) for host in hosts)


def address_of(url: str) -> str | None:
    """Return host and port of a URL, as ``host:port``; None if the text is no URL of HTTP."""
    if (address := _address(url)) is None:
        return None
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(url: str) -> tuple[str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
    except (KeyError, ValueError):  # a reference to a vault, a template, a port that is no number
        return None
    return (parts.hostname, port) if parts.hostname else None


def gateway_books(
    gateway: str, before: Ledger, spool: Spool, after: Ledger, included: frozenset[str]
) -> GatewayBooks:
    """Return the events sent to the destinations in `included`, and the hours that cannot be compared.

    `spool` was read after the meters and before `after`.
    """
    earlier, lines = _sent(before.lines, included), _sent(after.lines, included)
    open_hours = dict.fromkeys(_waiting_hours(spool, after, included), f"events of {gateway} are waiting")
    for line in earlier.keys() | lines.keys():
        if earlier.get(line) != lines.get(line):
            open_hours.setdefault(line.hour, f"the ledger of {gateway} changed while it was read")
    return GatewayBooks(gateway, lines, open_hours)


def _waiting_hours(spool: Spool, after: Ledger, included: frozenset[str]) -> set[datetime]:
    """Return the hours with waiting events of included destinations; of any destination if unknown.

    The ledger has the hours of events that are written but not accounted for, but not their destinations.
    If none of them had such events after the meters were read, its lines are enough.
    """
    if all(part.not_accounted.events == 0 for part in spool.destinations if part.id in included):
        return {line.hour for line in after.lines if line.waiting and line.destination in included}
    return set(after.hours_with_waiting_events)


def _sent(lines: Iterable[LedgerLine], included: frozenset[str]) -> dict[Line, Sent]:
    found: dict[Line, Sent] = {}
    for entry in lines:
        if entry.destination in included:
            line = Line(entry.hour, entry.type, entry.subject)
            number = Sent(entry.delivered, entry.dead_lettered, entry.lost)
            found[line] = found[line].plus(number) if line in found else number
    return found


def other_destinations(
    gateway: str, spool: Spool, ledger: Ledger, included: frozenset[str]
) -> tuple[OtherDestination, ...]:
    """Return the destinations that are not in `included` and have events in the ledger."""
    endpoints = {part.id: part.endpoint for part in spool.destinations}
    events: dict[str, int] = {}
    for line in ledger.lines:
        if line.destination not in included:
            events[line.destination] = events.get(line.destination, 0) + line.accepted
    return tuple(
        OtherDestination(gateway, destination, endpoints.get(destination), number)
        for destination, number in sorted(events.items())
    )


def merged(found: Iterable[OtherDestination]) -> tuple[OtherDestination, ...]:
    """Return each destination once, with the sum of its events."""
    sums: dict[tuple[str, str, str | None], int] = {}
    for one in found:
        key = (one.gateway, one.destination, one.endpoint)
        sums[key] = sums.get(key, 0) + one.events
    return tuple(
        OtherDestination(*key, events) for key, events in sorted(sums.items(), key=lambda item: item[0][:2])
    )
