"""The configuration: syncd.yaml, overridden by the environment.

``SYNCD_METERING__TOKEN`` sets metering.token, ``SYNCD_SOURCES__0__TOKEN`` the token of the first source.
`load` raises ConfigError naming the field and the file. Relative paths are relative to the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from syncd.errors import ConfigError
from syncd.listen import Listen
from syncd.ownership import RESERVED_KEYS, is_label_value

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+)\s*([smhd])")


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("a duration is a number and a unit, such as 30s, 5m or 1h")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password; use token")
    if parts.query or parts.fragment:
        raise ValueError("must end with the path, without ? or #")
    return value.rstrip("/")


def _label(value: str) -> str:
    if not is_label_value(value):
        raise ValueError("must be 1 to 63 letters and digits, with single dashes between them")
    return value


def _not_reserved(value: dict[str, str]) -> dict[str, str]:
    if taken := sorted(RESERVED_KEYS & value.keys()):
        raise ValueError(f"must not set {', '.join(taken)}: syncd's own marks")
    return value


Duration = Annotated[timedelta, BeforeValidator(_duration)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Key = Annotated[str, Field(min_length=1, max_length=256)]
Tag = Annotated[str, Field(min_length=1, pattern=r"^[^,/]+$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KongAdminSource(_Section):
    """Consumers from Kong's Admin API; only those that carry all of `tags`."""

    type: Literal["kong-admin"]
    url: HttpUrl
    token: SecretStr | None = None
    workspace: str | None = Field(None, min_length=1)
    tags: tuple[Tag, ...] = ()
    timeout: Duration = timedelta(seconds=10)


class DeclarativeFileSource(_Section):
    """Consumers from a kong.yml."""

    type: Literal["declarative-file"]
    path: Path


class ApplicationsFileSource(_Section):
    """Applications from a file of the shape of Konnect's list."""

    type: Literal["applications-file"]
    path: Path


class StaticSubjectConfig(_Section):
    """A subject whose usage does not pass through Kong."""

    key: Key
    name: str | None = Field(None, min_length=1, max_length=256)
    metadata: Annotated[dict[str, str], AfterValidator(_not_reserved)] = Field(default_factory=dict)
    customer: Key | None = None


class StaticSource(_Section):
    """Subjects named right here."""

    type: Literal["static"]
    subjects: tuple[StaticSubjectConfig, ...]


SourceConfig = Annotated[
    KongAdminSource | DeclarativeFileSource | ApplicationsFileSource | StaticSource,
    Field(discriminator="type"),
]


class MeteringConfig(_Section):
    """The metering API that customers and subjects are kept in."""

    dialect: Literal["openmeter-v1"] = "openmeter-v1"
    url: HttpUrl
    token: SecretStr | None = None
    timeout: Duration = timedelta(seconds=10)
    attempts: int = Field(5, ge=1, le=20)


class MappingConfig(_Section):
    """How principals become customers."""

    group_by: Literal["none", "tag"] = "tag"
    subject_field: Literal["id", "username", "custom_id"] = "id"
    include_anonymous: bool = False
    anonymous_consumers: tuple[str, ...] = ()


class ScheduleConfig(_Section):
    """When the daemon syncs by itself, besides once at its start."""

    interval: Duration = timedelta(minutes=5)


class DaemonConfig(_Section):
    """The daemon's HTTP API; any address but loopback needs a token."""

    # NoDecode: from the environment it is this text, not JSON.
    listen: Annotated[Listen, NoDecode, BeforeValidator(Listen.parse)] = Listen("127.0.0.1", 8890)
    token: SecretStr | None = None

    @model_validator(mode="after")
    def _guard(self) -> Self:
        if not self.listen.is_loopback and self.token is None:
            raise ValueError("listen is not a loopback address, so token must be set")
        return self


def _policy(value: object) -> object:
    if value == "sync":
        raise ValueError("policy sync (which detaches what is gone) is not available yet; use upsert-only")
    return value


class Config(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        env_prefix="SYNCD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    owner_id: Annotated[str, AfterValidator(_label)] = "default"
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    metering: MeteringConfig
    mapping: MappingConfig = MappingConfig()
    policy: Annotated[Literal["create-only", "upsert-only"], BeforeValidator(_policy)] = "upsert-only"
    schedule: ScheduleConfig = ScheduleConfig()
    daemon: DaemonConfig = DaemonConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - replaced by ours
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not used: one file is enough
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not used
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file."""
        return (_Environment(settings_cls, init_settings()), init_settings)


class _Environment(EnvSettingsSource):
    """The environment; ``SYNCD_SOURCES__0__TOKEN`` sets one field of one source of the file."""

    def __init__(self, settings_cls: type[BaseSettings], from_file: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._from_file = from_file

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        fields = values.get("sources")
        if not isinstance(fields, dict):
            return values
        listed = self._from_file.get("sources")
        sources = list(listed) if isinstance(listed, list) else []
        for index, overrides in sorted(fields.items()):
            if not index.isdigit() or int(index) >= len(sources):
                raise ConfigError(
                    f"environment variable SYNCD_SOURCES__{index.upper()}__...:"
                    f" the file has {len(sources)} sources, counted from 0"
                )
            if isinstance(sources[int(index)], dict) and isinstance(overrides, dict):
                sources[int(index)] = {**sources[int(index)], **overrides}
        values["sources"] = sources
        return values


def load(path: Path) -> Config:
    """Read and check the configuration; raises ConfigError."""
    document = _read(path)
    try:
        config = Config(**document)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from None
    except SettingsError as error:
        # Its message names the field; the value, which may be a secret, is only in its cause.
        raise ConfigError(f"the environment (SYNCD_...): {error}") from None
    return config.model_copy(update={"sources": tuple(_anchored(s, path.parent) for s in config.sources)})


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}. Pass --config FILE"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {_where(error)}") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise ConfigError(f"{path} must be a mapping of settings")
    return document


def _where(error: Exception) -> str:
    """Return place and kind of a YAML error, never the text around it, which may be a token."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{problem or 'it cannot be parsed'}"


def _anchored(source: SourceConfig, folder: Path) -> SourceConfig:
    if isinstance(source, DeclarativeFileSource | ApplicationsFileSource):
        return source.model_copy(update={"path": folder / source.path})
    return source


_TAGS = frozenset({"kong-admin", "declarative-file", "applications-file", "static"})


def _explain(error: ValidationError, path: Path) -> str:
    """Name each field, what is wrong with it, and where it comes from; never its value."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        parts = [part for part in fault["loc"] if part not in _TAGS]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        message = fault["msg"].removeprefix("Value error, ")
        variable = "SYNCD_" + "__".join(str(part).upper() for part in parts)
        lines.append(f"  {field or 'settings'}: {message} (environment: {variable})")
    return f"{path}: the configuration cannot be used\n" + "\n".join(lines)
