"""The whole configuration: syncd.yaml, overridden by the environment.

``SYNCD_METERING__TOKEN`` sets metering.token, ``SYNCD_SOURCES__0__TOKEN`` the token of the first source,
``SYNCD_GATEWAYS__0__TOKEN`` that of the first gateway. ``${VAR}`` in the file is that variable's value.
Relative paths are relative to the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from openmeter_plugin.units import plural
from syncd.config.faults import explain
from syncd.config.mapping import MappingConfig
from syncd.config.prices import PricesConfig
from syncd.config.sections import (
    DaemonConfig,
    GatewayConfig,
    GuardsConfig,
    IgnoredSubjectConfig,
    NotifyConfig,
    PolicyOptionsConfig,
    ScheduleConfig,
    UsageConfig,
    check_unique,
)
from syncd.config.sources import (
    ApplicationsFileSource,
    DeclarativeFileSource,
    KongAdminSource,
    KonnectApplicationsSource,
    KonnectConsumersSource,
    SourceConfig,
    source_names,
)
from syncd.config.types import ConnectionConfig, Duration, HttpUrl, Label, Token
from syncd.config.variables import expanded, refuse_unknown, unreadable
from syncd.core.errors import ConfigError
from syncd.core.policy import Policy
from syncd.core.text_yaml import Document, YamlError, parse

_MAX_CONCURRENCY = 64
"""Threads, and thus requests in flight to one API."""
_LISTS = ("sources", "gateways", "ignore")
"""Lists whose entries the environment can override field by field."""


Dialect = Literal["openmeter-v1", "openmeter-v3"]
"""The dialects of the metering API; `syncd.metering.dialects` has the client of each."""


# Konnect's docs link the list of customers without its region ("Billing, invoicing, and subscriptions") and
# another page with it ("Collect payments with Stripe"). They do not say that a customer's page has its id.
_KONNECT_PAGE = "https://cloud.konghq.com/{region}/metering-billing/customers/{id}"


def _customer_url(value: str) -> str:
    if value == "":
        return value
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "{" in parts.netloc:
        raise ValueError("must be an http:// or https:// URL")
    if unknown := set(re.findall(r"\{[^}]*\}", value)) - {"{id}", "{key}"}:
        raise ValueError(f"has no field {min(unknown)}; a customer has {{id}} and {{key}}")
    if "{id}" not in value and "{key}" not in value:
        raise ValueError("must contain {id} or {key}, such as https://billing.example.com/customers/{id}")
    return value


class MeteringConfig(ConnectionConfig):
    """The metering API."""

    dialect: Dialect = "openmeter-v1"
    """`openmeter-v1`: a self-hosted OpenMeter. `openmeter-v3`: Konnect and newer self-hosted servers."""
    url: HttpUrl
    """URL of the metering API: `http://openmeter:8888`, `https://eu.api.konghq.com`."""
    token: Token | None = None
    """Bearer token; needs permission to read and write customers and subjects."""
    timeout: Duration = timedelta(seconds=10)
    """Limit for each step of a request: connect, send, each read. The whole request may take three times as
    long."""
    attempts: int = Field(5, ge=1, le=20)
    """Maximum number of tries for a request that may be repeated."""
    concurrency: int = Field(8, ge=1, le=_MAX_CONCURRENCY)
    """Maximum number of requests in flight."""
    dedupe_expiration: Duration = timedelta(hours=24)
    """How long the metering API remembers the ids of events: in OpenMeter the `expiration` of the sink's
    `dedupe`. `syncd audit --redeliver` redelivers no older hours, whose other events would count twice."""

    customer_url: Annotated[str, AfterValidator(_customer_url)] | None = None
    """Address of a customer's page in the metering service, with `{id}` or `{key}`, for the dashboard.
    Unset: Konnect's page if `url` is Konnect's, else no link: the open source OpenMeter has no pages. `""`:
    no link."""

    def page_of(self, customer_id: str, key: str | None) -> str | None:
        """Return the address of a customer's own page, None if there is none."""
        template = self.customer_url
        if template is None and self.is_konnect:
            region = (urlsplit(self.url).hostname or "").partition(".")[0]
            template = _KONNECT_PAGE.replace("{region}", region)
        if not template or ("{key}" in template and key is None):
            return None
        fields = {"{id}": quote(customer_id, safe=""), "{key}": quote(key or "", safe="")}
        return re.sub(r"\{(?:id|key)\}", lambda found: fields[found[0]], template)

    @property
    def base_url(self) -> str:
        """Return the URL before the dialect's paths; `url` may end with its /api/v1, /api/v3 or /v3."""
        if self.dialect == "openmeter-v1":
            return self.url.removesuffix("/api/v1")
        if self.url.endswith("/v3"):
            return self.url
        return f"{self.url}/v3" if self.is_konnect else f"{self.url}/api/v3"

    @property
    def is_konnect(self) -> bool:
        """Return whether this is Kong's hosted service."""
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
    """Written into the metadata of everything that syncd creates (`sync-owner`). syncd never changes
    customers with another value. Do not change it later."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources of consumers, applications and static subjects. Each run reads all of them."""
    metering: MeteringConfig
    """The metering API that holds customers and subjects."""
    mapping: MappingConfig = MappingConfig()
    """Rules from consumers and applications to customers."""
    policy: Policy = "upsert-only"
    """`create-only` never changes existing customers, `upsert-only` never detaches or deletes, `sync` does,
    after a grace period."""
    policy_options: PolicyOptionsConfig = PolicyOptionsConfig()
    """The grace periods of `sync`."""
    guards: GuardsConfig = GuardsConfig()
    """Limits that stop a run before its first change."""
    schedule: ScheduleConfig = ScheduleConfig()
    """When `syncd run` starts runs, in addition to the one at its start."""
    daemon: DaemonConfig = Field(default_factory=DaemonConfig)
    """HTTP API, dashboard and state of `syncd run`."""
    ignore: tuple[IgnoredSubjectConfig, ...] = ()
    """Subjects whose unbilled usage is meant to be so, such as health checks. They stay visible, and leave
    alerts, exit statuses and "in sync" alone."""
    notify: NotifyConfig = NotifyConfig()
    """Messages to people about what needs them."""
    usage: UsageConfig = UsageConfig()
    """The usage that the daemon keeps for the dashboard."""
    prices: PricesConfig | None = None
    """Prices for estimates of what usage is worth. Unset: no amounts of money are shown."""
    gateways: tuple[GatewayConfig, ...] = ()
    """The gateways whose books `syncd audit` and the dashboard read. List all that send to this metering
    API."""

    @field_validator("sources")
    @classmethod
    def _unique_sources(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        source_names(sources)
        return sources

    @field_validator("gateways")
    @classmethod
    def _unique_gateways(cls, gateways: tuple[GatewayConfig, ...]) -> tuple[GatewayConfig, ...]:
        return check_unique(gateways)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - replaced by _Environment
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not used: one file is enough
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not used
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Give the environment precedence over the file."""
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
        """Return the file's list with the fields that the environment sets."""
        listed = self._from_file.get(name)
        entries = list(listed) if isinstance(listed, list) else []
        for index, overrides in sorted(fields.items()):
            if not index.isdigit() or int(index) >= len(entries):
                raise ConfigError(
                    f"environment variable SYNCD_{name.upper()}__{index.upper()}__...:"
                    f" the file has {plural(len(entries), 'entry', 'entries')} in {name}, counted from 0"
                )
            if isinstance(entries[int(index)], dict) and isinstance(overrides, dict):
                entries[int(index)] = {**entries[int(index)], **overrides}
        return entries


def load(path: Path) -> Config:
    """Read and check the configuration; raises ConfigError, which names the field and the file."""
    document = _read(path)
    refuse_unknown(os.environ, Config)
    try:
        settings = expanded(document.value or {}, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply, or an alias contains itself") from None
    try:
        config = Config(**cast("dict[str, Any]", settings))
    except ValidationError as error:
        faults = "\n".join(f"  {line}" for line in explain(error, Config, document, os.environ))
        raise ConfigError(f"{path}: the configuration is invalid\n{faults}") from None
    except SettingsError as error:
        # The message names the section; only its cause has the value, which may be a secret.
        raise ConfigError(unreadable(str(error), os.environ)) from None
    sources = tuple(_resolved(source, path.parent) for source in config.sources)
    state_dir = path.parent / config.daemon.state_dir.expanduser()
    daemon = config.daemon.model_copy(update={"state_dir": state_dir})
    mapping = config.mapping.resolved(path.parent)
    metering = config.metering.in_folder(path.parent)
    gateways = tuple(gateway.in_folder(path.parent) for gateway in config.gateways)
    config = config.model_copy(
        update={
            "sources": sources,
            "metering": metering,
            "mapping": mapping,
            "daemon": daemon,
            "gateways": gateways,
        }
    )
    try:
        _check_connections(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def _check_connections(config: Config) -> None:
    """Check certificates, proxies and tokens of all APIs; raises ConfigError, which names the setting."""
    config.metering.check("metering", config.metering.base_url, config.metering.token)
    for index, source in enumerate(config.sources):
        if isinstance(source, KongAdminSource):
            source.check(f"sources[{index}]", source.url, source.token)
        elif isinstance(source, KonnectConsumersSource | KonnectApplicationsSource):
            source.check(f"sources[{index}]", source.base_url, source.token)
    for index, gateway in enumerate(config.gateways):
        gateway.check(f"gateways[{index}]", gateway.url, gateway.token)


def _read(path: Path) -> Document:
    try:
        document = parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}. Pass --config FILE"
        ) from None
    except YamlError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if document.value is None:
        return document
    if not isinstance(document.value, dict) or not all(isinstance(name, str) for name in document.value):
        raise ConfigError(f"{path} must be a mapping of settings")
    return document


def _resolved(source: SourceConfig, folder: Path) -> SourceConfig:
    if isinstance(source, DeclarativeFileSource | ApplicationsFileSource):
        return source.model_copy(update={"path": folder / source.path})
    return source.in_folder(folder) if isinstance(source, ConnectionConfig) else source
