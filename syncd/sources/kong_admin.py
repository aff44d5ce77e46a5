"""Consumers from Kong's Admin API (open source; Enterprise with a workspace and a Kong-Admin-Token).

What the API does (kong-admin-oss-3.9.yaml; recordings tests/data/kong-wire/admin-*):

- GET /consumers pages by an opaque `offset`, absent or null at the end; `size` is 1000 at most.
- GET / answers 500 while Kong manages a plugin server, so nothing here asks it.
- GET /status has `configuration_hash` only without a database or on a data plane; 32 zeros mean
  "not configured yet", which is not "no consumers".
- The filter `tags` answers 500 without a database when some consumers have no tags, so it is sent
  only to a Kong with one; what it returns is filtered here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from syncd.errors import ApiError, SourceError
from syncd.http import ApiClient, Endpoint, expect_list, expect_object
from syncd.model import Principal
from syncd.retry import Retry
from syncd.sources.base import anonymous_reference, tags, text

_PAGE_SIZE = 1000
_NOT_CONFIGURED = "0" * 32


@dataclass(frozen=True, slots=True)
class KongAdmin:
    """One Kong, or one workspace of it; only consumers that carry all of `tags`."""

    endpoint: Endpoint
    retry: Retry
    workspace: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call this source."""
        workspace = f"/{self.workspace}" if self.workspace else ""
        return f"kong-admin {self.endpoint.url}{workspace}"

    def read(self) -> Sequence[Principal]:
        """Return the consumers, those marked that a plugin uses as `anonymous`."""
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                has_database = self._require_ready(client)
                plugins = list(self._pages(client, "/plugins", {}))
                params = {"tags": ",".join(self.tags)} if self.tags and has_database else {}
                consumers = list(self._pages(client, "/consumers", params))
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None
        anonymous = {name for plugin in plugins if (name := anonymous_reference(plugin))}
        principals = {}
        for item in consumers:
            principal = self._principal(item, anonymous)
            principals[principal.id] = principal
        wanted = set(self.tags)
        return [principal for principal in principals.values() if wanted <= set(principal.tags)]

    def _require_ready(self, client: ApiClient) -> bool:
        """Raise SourceError while Kong has no configuration; tell whether it has a database."""
        status = expect_object(client.get("/status"), self.name, "/status")
        if status.get("configuration_hash") == _NOT_CONFIGURED:
            raise SourceError(self.name, "Kong has not loaded its configuration yet; try again when it has")
        return "configuration_hash" not in status

    def _pages(self, client: ApiClient, path: str, params: dict[str, str]) -> Iterator[dict[str, object]]:
        prefix = f"/{quote(self.workspace, safe='')}" if self.workspace else ""
        offset: str | None = None
        seen: set[str] = set()
        while True:
            query: dict[str, str | int | list[str]] = {**params, "size": _PAGE_SIZE}
            if offset is not None:
                query["offset"] = offset
            page = expect_object(client.get(f"{prefix}{path}", query), self.name, path)
            # Lua cannot tell an empty list from an empty object.
            entries = [] if page.get("data") == {} else page.get("data")
            for item in expect_list(entries, self.name, f"data of {path}"):
                yield expect_object(item, self.name, f"an entry of {path}")
            offset = self._next_offset(page, path)
            if offset is None:
                return
            if offset in seen:
                raise SourceError(self.name, f"{path}: the same page comes again, the list has no end")
            seen.add(offset)

    def _next_offset(self, page: dict[str, object], path: str) -> str | None:
        offset, following = page.get("offset"), page.get("next")
        if offset is None and isinstance(following, str):
            offset = next(iter(parse_qs(urlsplit(following).query).get("offset", [])), None)
            if offset is None:
                raise SourceError(
                    self.name, f"{path}: there is a next page, but no offset to ask for it with"
                )
        if offset is not None and not isinstance(offset, str):
            raise SourceError(self.name, f"{path}: offset is not a string")
        return offset

    def _principal(self, item: dict[str, object], anonymous: set[str]) -> Principal:
        identity = text(item, "id", self.name, "a consumer")
        if identity is None:
            raise SourceError(self.name, "a consumer has no id")
        what = f"consumer {identity}"
        username = text(item, "username", self.name, what)
        return Principal(
            kind="consumer",
            id=identity,
            source=self.name,
            username=username,
            custom_id=text(item, "custom_id", self.name, what),
            tags=tags(item, self.name, what),
            anonymous=bool({identity, username} & anonymous),
        )
