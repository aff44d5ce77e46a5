"""Settings of each type of source."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from syncd.config.types import ConnectionConfig, Duration, HttpUrl, Key, Metadata, Section, Tag, Token


class _Source(Section):
    """Settings that all types of sources share."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name for messages and `resync --source`. Unset: type and position, such as `kong-admin-0`."""
    may_be_empty: bool = False
    """Whether this source may have nothing, such as a portal without applications. Otherwise a run in which
    it is empty removes nothing, not even what other sources no longer name."""


class KongAdminSource(_Source, ConnectionConfig):
    """Consumers from Kong's Admin API."""

    type: Literal["kong-admin"]
    """Consumers from Kong's Admin API."""
    url: HttpUrl
    """URL of the Admin API, without the workspace: `http://127.0.0.1:8001`."""
    token: Token | None = None
    """Sent as Kong-Admin-Token; Enterprise only."""
    workspace: str | None = Field(None, min_length=1)
    """Read only this workspace; Enterprise only."""
    tags: tuple[Tag, ...] = ()
    """Only consumers that carry all of these."""
    timeout: Duration = timedelta(seconds=10)
    """Limit for each step of a request: connect, send, each read. The whole request may take three times as
    long."""


class _Konnect(_Source, ConnectionConfig):
    """Settings of Konnect's API: that of a region, or another by `url`."""

    region: str | None = Field(None, pattern=r"^[a-z]{2,8}$")
    """Region of Konnect, such as `us` or `eu`. Set either this or `url`."""
    url: HttpUrl | None = None
    """URL of Konnect's API instead of `region`, without /v2 or /v3."""
    token: Token | None = None
    """Konnect access token; needs permission to read what this source reads."""
    timeout: Duration = timedelta(seconds=10)
    """Limit for each step of a request: connect, send, each read. The whole request may take three times as
    long."""

    @model_validator(mode="after")
    def _has_one_address(self) -> Self:
        if (self.region is None) == (self.url is None):
            raise ValueError("needs either region (such as us or eu) or url")
        return self

    @property
    def base_url(self) -> str:
        """Return the URL of the API."""
        return self.url or f"https://{self.region}.api.konghq.com"


class KonnectConsumersSource(_Konnect):
    """Consumers of a control plane."""

    type: Literal["konnect-consumers"]
    """Consumers of a Konnect control plane."""
    control_plane_id: str = Field(min_length=1)
    """Id of the control plane."""
    tags: tuple[Tag, ...] = ()
    """Only consumers that carry all of these."""


class KonnectApplicationsSource(_Konnect):
    """Applications of a Dev Portal, and the consumers that represent them on a gateway."""

    type: Literal["konnect-applications"]
    """Applications of a Konnect Dev Portal."""
    portal_id: str = Field(min_length=1)
    """Id of the Dev Portal."""
    mapped_consumers: bool = True
    """Whether the consumer that represents an application on a gateway shares the application's customer
    (Gateway 3.15 and newer)."""


class DeclarativeFileSource(_Source):
    """Consumers from a kong.yml."""

    type: Literal["declarative-file"]
    """Consumers of a kong.yml, with the ids that a DB-less Kong assigns."""
    path: Path
    """Relative to the configuration."""


class ApplicationsFileSource(_Source):
    """Applications from a file in the format of Konnect's list."""

    type: Literal["applications-file"]
    """Applications from a file in the format of Konnect's list."""
    path: Path
    """Relative to the configuration."""


class StaticSubjectConfig(Section):
    """A subject whose usage does not pass through Kong."""

    key: Key
    """Subject of its events."""
    name: str | None = Field(None, min_length=1, max_length=256)
    """Name of its customer."""
    metadata: Metadata = Field(default_factory=dict)
    """Metadata of its customer."""
    customer: Key | None = None
    """Key of its customer. Unset: a customer of its own."""


class StaticSource(_Source):
    """Subjects that the configuration itself names."""

    type: Literal["static"]
    """Subjects whose usage does not pass through Kong."""
    subjects: tuple[StaticSubjectConfig, ...]
    """The subjects."""


_AnySource = (
    KongAdminSource
    | KonnectConsumersSource
    | KonnectApplicationsSource
    | DeclarativeFileSource
    | ApplicationsFileSource
    | StaticSource
)
SourceConfig = Annotated[_AnySource, Field(discriminator="type")]

SOURCE_TYPES = frozenset(
    str(kind.model_fields["type"].annotation.__args__[0]) for kind in get_args(_AnySource)
)
"""The values of `type`."""


def source_names(sources: tuple[SourceConfig, ...]) -> tuple[str, ...]:
    """Return the name of each source; raises ValueError if two are the same."""
    names = tuple(source.name or f"{source.type}-{index}" for index, source in enumerate(sources))
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two sources are called {', '.join(duplicates)}; give each its own name")
    return names


def may_be_empty(sources: Iterable[SourceConfig]) -> frozenset[str]:
    """Return the names of the sources that may have nothing."""
    sources = tuple(sources)
    named = zip(sources, source_names(sources), strict=True)
    return frozenset(name for source, name in named if source.may_be_empty)
