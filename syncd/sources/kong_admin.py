"""Consumers from Kong's Admin API (open source; Enterprise with a workspace and a Kong-Admin-Token).

Behaviour of the API (kong-admin-oss-3.9.yaml; recordings tests/data/kong-wire/admin-*):

- GET /consumers pages by an opaque `offset`, absent or null at the end; `size` is 1000 at most.
- GET / answers 500 while Kong manages a plugin server, so it is never requested.
- GET /status has `configuration_hash` only without a database or on a data plane; 32 zeros mean
  "not configured yet", which is not "no consumers". Without a database an offset is a position in a list
  that a new configuration replaces at once, so a hash that changes during the read causes another read.
- A token of Enterprise's RBAC may be limited to one workspace; then all requests have to begin with the
  workspace, and /status may be refused (403). Such a Kong has a database, where the hash is not needed.
- A path that begins with a workspace is 404 in open-source Kong, which has none.
- Without a database the filter `tags` answers 500 if some consumers have no tags, so it is sent only to a
  Kong with a database; the answer is filtered here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from syncd.core.errors import ApiError, RefusedError, SourceError, UnauthorizedError
from syncd.core.model import Principal
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_object
from syncd.http.retry import Retry
from syncd.sources.base import read_consumers

_NOT_CONFIGURED = "0" * 32
_NOT_FOUND = 404
_MAX_READS = 3


@dataclass(frozen=True, slots=True)
class KongAdmin:
    """One Kong, or one workspace of it; only consumers that carry all of `tags`."""

    endpoint: Endpoint
    retry: Retry = field(compare=False)
    workspace: str | None = None
    tags: tuple[str, ...] = ()
    name: str = "kong-admin"

    def fingerprint(self) -> str | None:
        """Return the hash of Kong's configuration, None for a Kong with a database."""
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                return _hash(self._status(client))
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None

    def read(self) -> Sequence[Principal]:
        """Return the consumers; those that a plugin uses as `anonymous` are flagged."""
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                for _ in range(_MAX_READS):
                    found = self._read_once(client)
                    if found is not None:
                        return found
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None
        raise SourceError(
            self.name, f"Kong's configuration changed during each of {_MAX_READS} readings; try again"
        )

    def requests_answered(self) -> int | None:
        """Return how many requests Kong has answered since its start, its Admin API's among them.

        None if the token may not read /status; raises SourceError.
        """
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                status = self._status(client)
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None
        if status is None:
            return None
        server = status.get("server")
        number = server.get("total_requests") if isinstance(server, dict) else None
        return number if isinstance(number, int) else 0

    def _read_once(self, client: ApiClient) -> list[Principal] | None:
        """Return the consumers, None if the configuration changed during the read."""
        status = self._status(client)
        before = _hash(status)
        # Where it is not known whether there is a database, Kong is not asked to filter.
        send_tags = status is not None and before is None
        try:
            found = read_consumers(client, self.prefix, self.tags, source=self.name, send_tags=send_tags)
        except RefusedError as error:
            if error.status == _NOT_FOUND and self.workspace:
                raise self.missing_workspace() from None
            # An offset into a list that a new configuration replaced.
            if _hash(self._status(client)) == before:
                raise
            return None
        return found if _hash(self._status(client)) == before else None

    @property
    def prefix(self) -> str:
        """Return the start of the paths below which its lists are."""
        return f"/{quote(self.workspace, safe='')}" if self.workspace else ""

    def _status(self, client: ApiClient) -> dict[str, object] | None:
        """Return Kong's status, None if it cannot be read with this token.

        Raises SourceError while Kong has no configuration.
        """
        path = f"{self.prefix}/status"
        try:
            status = expect_object(client.get(path), self.name, path)
        except UnauthorizedError:
            return None  # a token that is wrong altogether is refused by the lists, too
        except RefusedError as error:
            if error.status == _NOT_FOUND and self.workspace:
                return None  # no such workspace, as the lists will say
            raise
        if status.get("configuration_hash") == _NOT_CONFIGURED:
            raise SourceError(self.name, "Kong has not loaded its configuration yet; try again later")
        return status

    def missing_workspace(self) -> SourceError:
        """Return the error for lists that are not there: below the prefix of a workspace, or at all."""
        return SourceError(
            self.name,
            f"Kong's Admin API at {self.endpoint.url} has no workspace {self.workspace!r}. Workspaces are a"
            " feature of Kong Gateway Enterprise: with an open-source Kong, remove the setting `workspace` of"
            " this source; with Enterprise, check its name",
        )


def _hash(status: dict[str, object] | None) -> str | None:
    """Return the hash of Kong's configuration, None with a database."""
    value = status.get("configuration_hash") if status else None
    return value if isinstance(value, str) and value else None
