"""The configuration: syncd.yaml, overridden by the environment.

``SYNCD_METERING__TOKEN`` sets metering.token, ``SYNCD_SOURCES__0__TOKEN`` the token of the first source,
``SYNCD_GATEWAYS__0__TOKEN`` that of the first gateway.
`load` raises ConfigError naming the field and the file. Relative paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from syncd.config.gateways import GatewayConfig, named_apart
from syncd.config.mapping import MappingConfig
from syncd.config.run import DaemonConfig, GuardsConfig, PolicyOptionsConfig, ScheduleConfig
from syncd.config.sources import (
    SOURCE_TYPES,
    ApplicationsFileSource,
    DeclarativeFileSource,
    SourceConfig,
    source_names,
)
from syncd.config.types import Duration, HttpUrl, Label, Section
from syncd.core.errors import ConfigError
from syncd.core.policy import Policy

_MAX_CONCURRENCY = 64
"""Threads, and so requests under way to one API."""
_LISTS = ("sources", "gateways")
"""Lists of which the environment sets single fields."""


class MeteringConfig(Section):
    """The metering API that customers and subjects are kept in."""

    dialect: Literal["openmeter-v1", "openmeter-v3"] = "openmeter-v1"
    """`openmeter-v1`: a self-hosted OpenMeter. `openmeter-v3`: Konnect, and newer self-hosted servers."""
    url: HttpUrl
    """Where it is: `http://openmeter:8888`, `https://eu.api.konghq.com`."""
    token: SecretStr | None = None
    """Bearer token; must be allowed to read and write customers and subjects."""
    timeout: Duration = timedelta(seconds=10)
    """For each request."""
    attempts: int = Field(5, ge=1, le=20)
    """How often a request that may be repeated is tried."""
    concurrency: int = Field(8, ge=1, le=_MAX_CONCURRENCY)
    """Requests under way at a time."""

    @property
    def base_url(self) -> str:
        """Return where the paths of the dialect begin, whether or not `url` says /v3 or /api/v3."""
        if self.dialect == "openmeter-v1" or self.url.endswith("/v3"):
            return self.url
        return f"{self.url}/v3" if self.is_konnect else f"{self.url}/api/v3"

    @property
    def is_konnect(self) -> bool:
        """Tell whether it is Kong's own."""
        return (urlsplit(self.url).hostname or "").endswith(".konghq.com")


class Config(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        env_prefix="SYNCD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    owner_id: Label = "default"
    """Written on all that syncd creates (`sync-owner`). What carries another one is never changed. Choose it
    once."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where consumers, applications and other subjects come from. All are read in each run."""
    metering: MeteringConfig
    """The metering API that customers and subjects are kept in."""
    mapping: MappingConfig = MappingConfig()
    """How consumers and applications become customers."""
    policy: Policy = "upsert-only"
    """`create-only` never changes what exists, `upsert-only` never detaches or deletes, `sync` does, after a
    grace period."""
    policy_options: PolicyOptionsConfig = PolicyOptionsConfig()
    """The grace periods of `sync`."""
    guards: GuardsConfig = GuardsConfig()
    """What stops a run before its first change."""
    schedule: ScheduleConfig = ScheduleConfig()
    """When `syncd run` syncs by itself, besides once at its start."""
    daemon: DaemonConfig = Field(default_factory=DaemonConfig)
    """Its HTTP API, dashboard and state."""
    gateways: tuple[GatewayConfig, ...] = ()
    """The gateways whose plugins `syncd audit` and the dashboard ask for their books: all that send to this
    metering API."""

    @field_validator("sources")
    @classmethod
    def _named_apart(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        source_names(sources)
        return sources

    @field_validator("gateways")
    @classmethod
    def _gateways_apart(cls, gateways: tuple[GatewayConfig, ...]) -> tuple[GatewayConfig, ...]:
        return named_apart(gateways)

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
        for name in _LISTS:
            if isinstance(fields := values.get(name), dict):
                values[name] = self._overridden(name, fields)
        return values

    def _overridden(self, name: str, fields: Mapping[str, Any]) -> list[Any]:
        """Return the file's list with the fields of its entries that the environment sets."""
        listed = self._from_file.get(name)
        entries = list(listed) if isinstance(listed, list) else []
        for index, overrides in sorted(fields.items()):
            if not index.isdigit() or int(index) >= len(entries):
                raise ConfigError(
                    f"environment variable SYNCD_{name.upper()}__{index.upper()}__...:"
                    f" the file has {len(entries)} {name}, counted from 0"
                )
            if isinstance(entries[int(index)], dict) and isinstance(overrides, dict):
                entries[int(index)] = {**entries[int(index)], **overrides}
        return entries


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
    sources = tuple(_anchored(source, path.parent) for source in config.sources)
    state_dir = path.parent / config.daemon.state_dir.expanduser()
    daemon = config.daemon.model_copy(update={"state_dir": state_dir})
    mapping = config.mapping.anchored(path.parent)
    return config.model_copy(update={"sources": sources, "mapping": mapping, "daemon": daemon})


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


def _explain(error: ValidationError, path: Path) -> str:
    """Name each field, what is wrong with it, and where it comes from; never its value."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        parts = [part for part in fault["loc"] if part not in SOURCE_TYPES]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        message = fault["msg"].removeprefix("Value error, ")
        variable = f" (environment: SYNCD_{'__'.join(str(part).upper() for part in parts)})"
        if "SYNCD_" in message:  # a fault of a section, whose message names the field itself
            variable = ""
        lines.append(f"  {field or 'settings'}: {message}{variable}")
    return f"{path}: the configuration cannot be used\n" + "\n".join(lines)
