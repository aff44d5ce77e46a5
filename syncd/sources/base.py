"""The interface of a source, shared checks, and the cache of readings that a daemon keeps between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from syncd.core.errors import SourceError
from syncd.core.model import Principal, shared


class Source(Protocol):
    """Where principals come from."""

    @property
    def name(self) -> str:
        """The name of this source in messages and for ``resync --source``, such as ``kong-admin-0``."""

    def fingerprint(self) -> str | None:
        """Return a value that changes whenever the principals do and is cheap to read, None if there is none.

        Raises SourceError.
        """

    def read(self) -> Sequence[Principal]:
        """Return all principals of this source; raises SourceError if it may not be all."""


def text(item: dict[str, object], field: str, source: str, what: str, remedy: str = "") -> str | None:
    """Return a string field, None if it is null, absent or empty; `remedy` is for one that is no string."""
    value = item.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise SourceError(source, f"{what}: {field} is {type(value).__name__}, not a string{remedy}")
    return value


def tags(item: dict[str, object], source: str, what: str) -> tuple[str, ...]:
    """Return the tags, none if they are null or absent."""
    value = item.get("tags")
    if value is None:
        return ()
    if not isinstance(value, list) or [tag for tag in value if not isinstance(tag, str)]:
        raise SourceError(source, f"{what}: tags is not a list of strings")
    found: tuple[str, ...] = shared(tuple(value))
    return found


def anonymous_reference(plugin: object) -> str | None:
    """Return the consumer (id or username) that a plugin uses for unauthenticated requests, if any.

    Kong's authentication plugins name it in ``config.anonymous``. Disabled plugins count too, so that
    disabling one for an hour does not create a customer.
    """
    if not isinstance(plugin, dict):
        return None
    config = plugin.get("config")
    anonymous = config.get("anonymous") if isinstance(config, dict) else None
    return anonymous if isinstance(anonymous, str) and anonymous else None


class Readings:
    """Reads sources, and caches the last reading of each until its fingerprint changes.

    Sources are values, compared by their settings, so one with new settings is read again. Not thread-safe:
    only one run at a time reads.
    """

    def __init__(self) -> None:
        self._cached: dict[Source, tuple[str, tuple[Principal, ...]]] = {}

    def read(self, source: Source) -> Sequence[Principal]:
        """Return all principals of a source, from the cache if its fingerprint is unchanged."""
        fingerprint = source.fingerprint()
        if fingerprint is None:
            return source.read()
        cached = self._cached.pop(source, None)
        if cached is None or cached[0] != fingerprint:
            # The fingerprint was taken before the reading, so the next run sees a change in between.
            cached = (fingerprint, tuple(source.read()))
        self._cached[source] = cached
        return cached[1]
