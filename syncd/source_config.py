"""The settings of each kind of source."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, SecretStr, model_validator

from syncd.config_types import Duration, HttpUrl, Key, Metadata, Section, Tag


class _Source(Section):
    """What every source has; without a `name` it is called by its type and place, such as kong-admin-0."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


class KongAdminSource(_Source):
    """Consumers from Kong's Admin API; only those that carry all of `tags`."""

    type: Literal["kong-admin"]
    url: HttpUrl
    token: SecretStr | None = None
    workspace: str | None = Field(None, min_length=1)
    tags: tuple[Tag, ...] = ()
    timeout: Duration = timedelta(seconds=10)


class _Konnect(_Source):
    """Konnect's API: the one of a region, or another by `url` (without /v2 or /v3)."""

    region: str | None = Field(None, pattern=r"^[a-z]{2,8}$")
    url: HttpUrl | None = None
    token: SecretStr | None = None
    timeout: Duration = timedelta(seconds=10)

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
    control_plane_id: str = Field(min_length=1)
    tags: tuple[Tag, ...] = ()


class KonnectApplicationsSource(_Konnect):
    """Applications of a Dev Portal, and the consumers they are mapped to."""

    type: Literal["konnect-applications"]
    portal_id: str = Field(min_length=1)
    mapped_consumers: bool = True


class DeclarativeFileSource(_Source):
    """Consumers from a kong.yml."""

    type: Literal["declarative-file"]
    path: Path


class ApplicationsFileSource(_Source):
    """Applications from a file of the shape of Konnect's list."""

    type: Literal["applications-file"]
    path: Path


class StaticSubjectConfig(Section):
    """A subject whose usage does not pass through Kong."""

    key: Key
    name: str | None = Field(None, min_length=1, max_length=256)
    metadata: Metadata = Field(default_factory=dict)
    customer: Key | None = None


class StaticSource(_Source):
    """Subjects named right here."""

    type: Literal["static"]
    subjects: tuple[StaticSubjectConfig, ...]


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
