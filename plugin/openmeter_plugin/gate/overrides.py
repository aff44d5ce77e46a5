"""Overrides: subjects that an operator allows everything for a time, with who and why, kept on disk."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field

from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.destination import write_atomically

_MAX_SECONDS: Final = 31 * 86_400
"""An override lasts a month at most."""


class OverrideRequest(BaseModel):
    """Whom to allow everything, for how many seconds, why, and who says so."""

    model_config = ConfigDict(extra="forbid")

    subject: Annotated[str, Field(min_length=1, max_length=1024)]
    seconds: Annotated[float, Field(gt=0, le=_MAX_SECONDS)]
    why: Annotated[str, Field(min_length=1, max_length=500)]
    by: Annotated[str, Field(max_length=200)] = ""


@dataclass(frozen=True, slots=True)
class Override:
    """An override; times are seconds since 1970."""

    subject: str
    until: float
    why: str
    by: str
    since: float


class Overrides:
    """The overrides in force. A change is on disk before it takes effect."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Override] = {}

    def load(self) -> None:
        """Read the file; an unreadable one is reported, and nobody is allowed more because of it."""
        try:
            self._found = {it["subject"]: Override(**it) for it in orjson.loads(self._path.read_bytes())}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            get_logger().error("gate_overrides_unreadable", reason=str(error), consequence="none is in force")

    def all(self) -> list[Override]:
        """Return all, those that end first first."""
        return sorted(self._found.values(), key=lambda override: override.until)

    def get(self, subject: str) -> Override | None:
        """Return the override of a subject."""
        return self._found.get(subject)

    def put(self, override: Override) -> None:
        """Add one, or replace the one of its subject; raises OSError."""
        self._store(self._found | {override.subject: override})

    def remove(self, subject: str) -> bool:
        """Remove one; returns whether it was there. Raises OSError."""
        if subject not in self._found:
            return False
        self._store({name: override for name, override in self._found.items() if name != subject})
        return True

    def ended(self, now: float) -> list[Override]:
        """Remove those that have ended, and return them; they stay in the file if it cannot be written."""
        ended = [override for override in self._found.values() if override.until <= now]
        for override in ended:
            get_logger().info("gate_override_expired", subject=override.subject)
            del self._found[override.subject]
        if ended:
            with contextlib.suppress(OSError):  # read again, they have ended as well
                self._store(self._found)
        return ended

    def _store(self, found: dict[str, Override]) -> None:
        write_atomically(self._path, orjson.dumps([asdict(override) for override in found.values()]))
        self._found = found
