"""Gateways, through the HTTP API of the plugin on each of them: their books, their ledger, sending again."""

from syncd.gateways.client import Gateway
from syncd.gateways.models import (
    DeadLetter,
    DeadLetters,
    Destination,
    Ledger,
    LedgerLine,
    Readiness,
    Redelivery,
    Spool,
)

__all__ = [
    "DeadLetter",
    "DeadLetters",
    "Destination",
    "Gateway",
    "Ledger",
    "LedgerLine",
    "Readiness",
    "Redelivery",
    "Spool",
]
