"""Konnect: consumers of a control plane, and applications of a Dev Portal.

Consumers (konnect-control-planes-config-v2.yaml) are paged as in Kong's Admin API. Applications and their
registrations are paged by number and may shift during the read (`syncd.http.pagination`). A registration
names the consumer that represents its application on a gateway (Gateway 3.15 and newer): usage may come
under either, so both are returned, and the mapping puts them into one customer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from syncd.core.errors import ApiError, SourceError
from syncd.core.model import Principal
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_list, expect_object
from syncd.http.pagination import Entry, Page, read_all
from syncd.http.retry import Retry
from syncd.sources.base import read_consumers, text


@dataclass(frozen=True, slots=True)
class KonnectConsumers:
    """One control plane; only consumers that carry all of `tags`."""

    endpoint: Endpoint
    retry: Retry = field(compare=False)
    control_plane_id: str = ""
    tags: tuple[str, ...] = ()
    name: str = "konnect-consumers"

    def fingerprint(self) -> None:
        """Return None: Konnect does not report changes, so the list is read in each run."""

    def read(self) -> Sequence[Principal]:
        """Return the consumers; those that a plugin uses as `anonymous` are flagged."""
        prefix = f"/v2/control-planes/{quote(self.control_plane_id, safe='')}/core-entities"
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                return read_consumers(client, prefix, self.tags, source=self.name, send_tags=True)
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None


@dataclass(frozen=True, slots=True)
class KonnectApplications:
    """One Dev Portal; with `mapped_consumers=False` registrations are not read."""

    endpoint: Endpoint
    retry: Retry = field(compare=False)
    portal_id: str = ""
    mapped_consumers: bool = True
    name: str = "konnect-applications"

    def fingerprint(self) -> None:
        """Return None: Konnect does not report changes, so the lists are read in each run."""

    def read(self) -> Sequence[Principal]:
        """Return the applications, then the consumers that represent them on a gateway."""
        portal = f"/v3/portals/{quote(self.portal_id, safe='')}"
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                listed = self._list(client, f"{portal}/applications")
                registrations = (
                    self._list(client, f"{portal}/application-registrations") if self.mapped_consumers else []
                )
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None
        applications = [application(item, self.name, "an application") for item in listed]
        known = {found.id for found in applications}
        mapped = [found for item in registrations if (found := self._consumer(item, known))]
        # An application has one registration for each API, all with the same consumer.
        consumers = {(found.id, found.application): found for found in mapped}
        return [*applications, *consumers.values()]

    def _list(self, client: ApiClient, path: str) -> list[Entry]:
        def fetch(number: int, size: int) -> Page:
            params: dict[str, str | int | list[str]] = {
                "page[size]": size,
                "page[number]": number,
                "sort": "created_at",
            }
            page = expect_object(client.get(path, params), self.name, path)
            entries = expect_list(page.get("data"), self.name, f"data of {path}")
            return Page(
                [expect_object(entry, self.name, f"an entry of {path}") for entry in entries], total(page)
            )

        return read_all(fetch, path, created="created_at")

    def _consumer(self, registration: Entry, known: set[str]) -> Principal | None:
        consumer, mapped_to = registration.get("consumer"), registration.get("application")
        if not isinstance(consumer, dict) or not isinstance(mapped_to, dict):
            return None
        what = f"the consumer of registration {registration.get('id')}"
        identity = text(consumer, "id", self.name, what)
        application_id = text(mapped_to, "id", self.name, what)
        if identity is None or application_id is None:
            raise SourceError(self.name, f"{what} has no id, or its application has none")
        if application_id not in known:
            return None  # registered after the applications were read; the next run sees it
        return Principal(
            kind="consumer",
            id=identity,
            source=self.name,
            username=text(consumer, "username", self.name, what),
            custom_id=text(consumer, "custom_id", self.name, what),
            application=application_id,
        )


def application(item: dict[str, object], source: str, what: str) -> Principal:
    """Return the principal of an application in Konnect's format; its owner is a developer or a team."""
    identity = text(item, "id", source, what)
    if identity is None:
        raise SourceError(source, f"{what} has no id")
    what = f"application {identity}"
    owner = item.get("owner")
    if owner is not None and not isinstance(owner, dict):
        raise SourceError(source, f"{what}: owner is not an object")
    kind, owner_id = (text(owner, part, source, what) for part in ("type", "id")) if owner else (None, None)
    return Principal(
        kind="application",
        id=identity,
        source=source,
        username=text(item, "name", source, what),
        owner=f"{kind}:{owner_id}" if kind and owner_id else None,
    )


def total(document: dict[str, object]) -> int | None:
    """Return meta.page.total, None if it is missing."""
    meta = document.get("meta")
    page = meta.get("page") if isinstance(meta, dict) else None
    value = page.get("total") if isinstance(page, dict) else None
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
