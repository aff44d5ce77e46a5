"""The interface of a source, what sources share, and the cache of readings that a daemon keeps between runs.

Shared are the checks of fields, and Kong's list of consumers, in the format and paging that the Admin API and
Konnect's control planes share: an opaque `offset` names the start of the next page; it is absent, null or
empty at the end. A list in a database is paged by primary key, so no entry shifts during the read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

from syncd.core.errors import SourceError
from syncd.core.model import Principal, shared
from syncd.http.client import ApiClient
from syncd.http.json import expect_object, expect_objects


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


_PAGE_SIZE = 1000
_MAX_PAGES = 10_000
"""Pages of one list, ten million consumers: a list that never ends must not fill the memory."""


def read_consumers(
    client: ApiClient, prefix: str, wanted: Iterable[str], *, source: str, send_tags: bool
) -> list[Principal]:
    """Read plugins and consumers under `prefix`; return the consumers that carry all `wanted` tags.

    Those that a plugin uses as `anonymous` are flagged as such. Raises ApiError or SourceError.
    """
    wanted = tuple(wanted)
    plugins = list(offset_pages(client, f"{prefix}/plugins", {}, source))
    params = {"tags": ",".join(wanted)} if wanted and send_tags else {}
    anonymous = {name for plugin in plugins if (name := anonymous_reference(plugin))}
    principals: dict[str, Principal] = {}
    for item in offset_pages(client, f"{prefix}/consumers", params, source):
        principal = _principal(item, anonymous, source)
        principals[principal.id] = principal
    return [
        principal for principal in principals.values() if not wanted or set(wanted) <= set(principal.tags)
    ]


def offset_pages(
    client: ApiClient, path: str, params: Mapping[str, str], source: str, max_pages: int = _MAX_PAGES
) -> Iterator[dict[str, object]]:
    """Yield the entries of all pages."""
    offset: str | None = None
    seen: set[object] = set()
    for _ in range(max_pages):
        query: dict[str, str | int | list[str]] = {**params, "size": _PAGE_SIZE}
        if offset is not None:
            query["offset"] = offset
        page = expect_object(client.get(path, query), source, path)
        # Lua does not distinguish an empty list from an empty object.
        data = [] if page.get("data") == {} else page.get("data")
        entries = expect_objects(data, source, f"data of {path}", f"an entry of {path}")
        offset = _next_offset(page, path, source)
        known = len(seen)
        seen.update(entry["id"] if isinstance(entry.get("id"), str) else repr(entry) for entry in entries)
        if offset is not None and len(seen) == known:
            raise SourceError(
                source, f"{path}: a page brought nothing new and named a next one, so the list has no end"
            )
        yield from entries
        if offset is None:
            return
    raise SourceError(source, f"{path}: more than {max_pages:,} pages; is its URL right?")


def _next_offset(page: dict[str, object], path: str, source: str) -> str | None:
    offset, following = page.get("offset"), page.get("next")
    if offset is None and isinstance(following, str) and following:
        offset = next(iter(parse_qs(urlsplit(following).query).get("offset", [])), None)
        if offset is None:
            raise SourceError(source, f"{path}: there is a next page, but no offset for it")
    if offset is not None and not isinstance(offset, str):
        raise SourceError(source, f"{path}: offset is not a string")
    return offset or None


def _principal(item: dict[str, object], anonymous: set[str], source: str) -> Principal:
    identity, username, custom_id = item.get("id"), item.get("username"), item.get("custom_id")
    # The full checks run only if something is wrong: there may be 100,000 consumers.
    if type(identity) is not str or not identity:
        identity = text(item, "id", source, "a consumer")
        if identity is None:
            raise SourceError(source, "a consumer has no id")
    if type(username) is not str:
        username = text(item, "username", source, f"consumer {identity}")
    if type(custom_id) is not str:
        custom_id = text(item, "custom_id", source, f"consumer {identity}")
    tagged = tags(item, source, f"consumer {identity}") if item.get("tags") else ()
    is_anonymous = identity in anonymous or username in anonymous
    return Principal("consumer", identity, source, username or None, custom_id or None, tagged, is_anonymous)
