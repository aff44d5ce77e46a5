"""The interface of a source, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from syncd.core.errors import SourceError
from syncd.core.model import Principal


class Source(Protocol):
    """Where principals come from."""

    @property
    def name(self) -> str:
        """What messages and ``resync --source`` call this source, for example ``kong-admin-0``."""

    def fingerprint(self) -> str | None:
        """Return what changes whenever the principals do and is cheap to ask for, None where nothing is.

        Raises SourceError.
        """

    def read(self) -> Sequence[Principal]:
        """Return all principals of this source; raises SourceError where that is not certain."""


def text(item: dict[str, object], field: str, source: str, what: str) -> str | None:
    """Return a field that is a string, null or absent; an empty string counts as absent."""
    value = item.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise SourceError(source, f"{what}: {field} is {type(value).__name__}, not a string")
    return value


def tags(item: dict[str, object], source: str, what: str) -> tuple[str, ...]:
    """Return the tags: a list of strings, null or absent."""
    value = item.get("tags")
    if value is None:
        return ()
    if not isinstance(value, list) or [tag for tag in value if not isinstance(tag, str)]:
        raise SourceError(source, f"{what}: tags is not a list of strings")
    return tuple(value)


def anonymous_reference(plugin: object) -> str | None:
    """Return the consumer (id or username) that a plugin lets unauthenticated requests be, if any.

    Kong's authentication plugins name it in ``config.anonymous``; disabled plugins count too, so
    that switching one off for an hour does not create a customer.
    """
    if not isinstance(plugin, dict):
        return None
    config = plugin.get("config")
    anonymous = config.get("anonymous") if isinstance(config, dict) else None
    return anonymous if isinstance(anonymous, str) and anonymous else None


# MERGED: What sources said last, kept between the runs of a daemon: an unchanged fingerprint saves the
# reading.


class Readings:
    """Reads sources, and remembers the last reading of each that has a fingerprint.

    A source is told apart by its settings (sources are values), so one that is configured anew is
    read anew. Not for several threads at once: one run at a time reads.
    """

    def __init__(self) -> None:
        self._kept: dict[Source, tuple[str, tuple[Principal, ...]]] = {}

    def read(self, source: Source) -> Sequence[Principal]:
        """Return all principals of a source, from memory if its fingerprint is that of the last reading."""
        fingerprint = source.fingerprint()
        if fingerprint is None:
            return source.read()
        kept = self._kept.pop(source, None)
        if kept is None or kept[0] != fingerprint:
            # The fingerprint is older than what is read now: a change in between is seen the next time.
            kept = (fingerprint, tuple(source.read()))
        self._kept[source] = kept
        return kept[1]
