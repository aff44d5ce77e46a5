"""The least that a log plugin under stock kong-pdk can do: what ours is measured against."""

from __future__ import annotations

import json
from typing import Any

Schema: list[Any] = []
version = "0"
priority = 15


class Plugin:
    """Reads the log and does nothing with it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def log(self, kong: Any) -> None:
        """Parse the serialized log."""
        answer = kong.log.serialize()
        json.loads(answer[0] if isinstance(answer, tuple) else answer)
