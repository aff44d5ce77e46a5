"""Defaults that the commands share. Imports next to nothing: Kong's requests wait while `serve` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_SPOOL: Final = Path("/var/lib/openmeter-plugin/spool")
MAX_ROW_ID: Final = 2**63 - 1
"""The largest id of a row in the books (SQLite)."""

SPOOL_VARIABLE: Final = "OPENMETER_PLUGIN_SPOOL"
