"""What the commands have in common. Imports next to nothing: Kong's requests wait while `serve` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_SPOOL: Final = Path("/var/lib/openmeter-plugin/spool")
LARGEST_ID: Final = 2**63 - 1
"""Of a row in the books (SQLite's)."""

SPOOL_VARIABLE: Final = "OPENMETER_PLUGIN_SPOOL"
