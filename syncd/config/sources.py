"""The settings of each kind of source."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, SecretStr, model_validator

from syncd.config.types import Duration, HttpUrl, Key, Metadata, Section, Tag


class _Source(Section):
    """What every source has; without a `name` it is called by its type and place, such as kong-admin-0."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """For messages and `resync --source`. Unset: type and place, such as `kong-admin-0`."""


class KongAdminSource(_Source):
    """Consumers from Kong's Admin API; only those that carry all of `tags`."""

    type: Literal["kong-admin"]
    """Consumers of a Kong, from its Admin API."""
    url: HttpUrl
    """Of the Admin API, without the workspace: `http://127.0.0.1:8001`."""
    token: SecretStr | None = None
    """Kong-Admin-Token; Enterprise only."""
    workspace: str | None = Field(None, min_length=1)
    """Only this workspace; Enterprise only."""
    tags: tuple[Tag, ...] = ()
    """Only consumers that carry all of these."""
    timeout: Duration = timedelta(seconds=10)
    """For each request."""


class _Konnect(_Source):
    """Konnect's API: the one of a region, or another by `url` (without /v2 or /v3)."""

    region: str | None = Field(None, pattern=r"^[a-z]{2,8}$")
    """Such as `us` or `eu`. Either this or `url`."""
    url: HttpUrl | None = None
    """In the place of `region`, without /v2 or /v3."""
    token: SecretStr | None = None
    """Konnect access token; must be allowed to read what this source reads."""
    timeout: Duration = timedelta(seconds=10)
    """For each request."""

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.region is None) == (self.url is None):
            raise ValueError("needs either region (such as us or eu) or url")
        return self

    @property
    def base_url(self) -> str:
        """Return where the API is."""
        return self.url or f"https://{self.region}.api.konghq.com"


class KonnectConsumersSource(_Konnect):
    """Consumers of a control plane; only those that carry all of `tags`."""

    type: Literal["konnect-consumers"]
    """Consumers of a Konnect control plane."""
    control_plane_id: str = Field(min_length=1)
    """Its id."""
    tags: tuple[Tag, ...] = ()
    """Only consumers that carry all of these."""


class KonnectApplicationsSource(_Konnect):
    """Applications of a Dev Portal, and the consumers they are mapped to."""

    type: Literal["konnect-applications"]
    """Applications of a Konnect Dev Portal."""
    portal_id: str = Field(min_length=1)
    """Its id."""
    mapped_consumers: bool = True
    """Whether the consumer that an application is on a gateway shares its customer (Gateway 3.15 and newer).
    """


class DeclarativeFileSource(_Source):
    """Consumers from a kong.yml."""

    type: Literal["declarative-file"]
    """Consumers of a kong.yml, with the ids that a Kong without a database gives them."""
    path: Path
    """Relative to the configuration."""


class ApplicationsFileSource(_Source):
    """Applications from a file of the shape of Konnect's list."""

    type: Literal["applications-file"]
    """Applications from a file of the shape of Konnect's list."""
    path: Path
    """Relative to the configuration."""


class StaticSubjectConfig(Section):
    """A subject whose usage does not pass through Kong."""

    key: Key
    """The subject of those events."""
    name: str | None = Field(None, min_length=1, max_length=256)
    """Name of its customer."""
    metadata: Metadata = Field(default_factory=dict)
    """Metadata of its customer."""
    customer: Key | None = None
    """Key of the customer to put it in. Unset: one of its own."""


class StaticSource(_Source):
    """Subjects named right here."""

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
    """Return what each source is called. Raises ValueError where two are called the same."""
    names = tuple(source.name or f"{source.type}-{index}" for index, source in enumerate(sources))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two sources are called {', '.join(twice)}; give each a name of its own")
    return names
