"""Reading both sides of an audit: each gateway's ledger, the meters, and each ledger once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from syncd.audit import Comparison, GatewayBooks, Line, Yardstick, compare
from syncd.audit_books import Elsewhere, elsewhere, leads_to, settled
from syncd.audit_meter import HourlyMeters
from syncd.errors import MeterMissingError
from syncd.gateways import Gateway, Ledger, Spool

REQUESTS = "kong.api_request"
TOKENS = "kong.llm_request"
_AT_ONCE = 8
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of a span; `yardsticks` are those of the types that occur.

    `lines` is how many ledger lines the gateway with the most has.
    """

    comparison: Comparison
    elsewhere: tuple[Elsewhere, ...]
    yardsticks: tuple[Yardstick, ...]
    lines: int


@dataclass(frozen=True, slots=True)
class Reader:
    """Both sides; `metering_url` tells which destinations of a gateway lead here."""

    gateways: Sequence[Gateway]
    meters: HourlyMeters
    metering_url: str

    def read(self, since: datetime, until: datetime) -> Reading:
        """Read and compare a span of whole hours.

        Raises GatewayError or the ApiError that fits where either side cannot be read to its end,
        MeterMissingError where no meter counts requests.
        """
        before = self._each(lambda gateway: gateway.ledger(since, until))
        types = {REQUESTS, TOKENS} | {line.type for ledger in before for line in ledger.lines}
        yardsticks = {kind: found for kind in sorted(types) if (found := self.meters.yardstick(kind))}
        if REQUESTS not in yardsticks or not yardsticks[REQUESTS].exact:
            raise MeterMissingError(
                f"no meter of the metering API counts {REQUESTS} events; `syncd meters apply` creates one"
            )
        values: dict[Line, int] = {}
        for used in yardsticks.values():
            values |= self.meters.values(used, since, until)
        spools = self._each(Gateway.spool)
        after = self._each(lambda gateway: gateway.ledger(since, until))
        return self._compared(since, until, before, spools, after, values, yardsticks)

    def _compared(
        self,
        since: datetime,
        until: datetime,
        before: Sequence[Ledger],
        spools: Sequence[Spool],
        after: Sequence[Ledger],
        values: dict[Line, int],
        yardsticks: dict[str, Yardstick],
    ) -> Reading:
        books: list[GatewayBooks] = []
        others: list[Elsewhere] = []
        for gateway, first, spool, last in zip(self.gateways, before, spools, after, strict=True):
            ours = frozenset(
                part.id
                for part in spool.destinations
                if leads_to(part.endpoint, self.metering_url, gateway.config.metering_hosts)
            )
            books.append(settled(gateway.name, first, spool, last, ours))
            others += elsewhere(gateway.name, spool, last, ours)
        comparison = compare(since, until, books, values, yardsticks)
        occurring = {line.type for one in books for line in one.lines} | {line.type for line in values}
        used = tuple(found for kind, found in yardsticks.items() if kind in occurring or kind == REQUESTS)
        return Reading(comparison, tuple(others), used, max(len(ledger.lines) for ledger in after))

    def _each(self, ask: Callable[[Gateway], _T]) -> list[_T]:
        """Ask all gateways, several at once; raises the first error."""
        with ThreadPoolExecutor(max_workers=max(1, min(_AT_ONCE, len(self.gateways)))) as pool:
            return list(pool.map(ask, self.gateways))
