"""Kong's list of consumers, in the format and paging that the Admin API and Konnect's control planes share.

An opaque `offset` names the start of the next page; it is absent, null or empty at the end. A list in a
database is paged by primary key, so no entry shifts during the read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import parse_qs, urlsplit

from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.http.client import ApiClient, expect_object, expect_objects
from syncd.sources.base import anonymous_reference, tags, text

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
