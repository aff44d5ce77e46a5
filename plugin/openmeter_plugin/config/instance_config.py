"""Validation of an instance's configuration, as Kong sends it in StartInstance.

Kong has validated it with the plugin's schema and filled in the defaults. It is validated again here,
because the control plane may have a newer or an older schema, and a wrong setting must be reported, not
guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeGuard
from urllib.parse import SplitResult, urlsplit

import orjson
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator

from openmeter_plugin.config.metering_settings import (
    AttributeConfig,
    FiltersConfig,
    LuaList,
    Record,
    Subject,
    SubjectPrefixesConfig,
    Text,
    UnitConfig,
)
from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.rules import Filters, Rules
from openmeter_plugin.spool.destination import is_header_value

DROPPING_QUEUE_KEYS: Final = (
    *("max_retry_time", "max_entries", "max_bytes"),
    *("failure_threshold", "breaker_cooldown"),  # Kong 3.16: after so many failures events are dropped
)
"""Settings of Kong's queue that make it drop events. The spool keeps events, so they have no effect."""


# CloudEvents has `source` be one, and OpenMeter refuses all events of a source that Go's url.Parse does not
# take: a colon before the first slash without a scheme, a port that is no number, %, control characters.
_URI_REFERENCE: Final = re.compile(
    r"(?:[A-Za-z][A-Za-z0-9+.-]*:|(?![^/?#]*:))"
    r"(?://(?:[^/?#@]*@)?(?:\[[^/?#\[\]]*\]|[^:\[\]/?#@ ]*)(?::[0-9]*)?(?=[/?#]|$)|(?!//))"
    r"(?:[^%\x00-\x1f\x7f]|%[0-9A-Fa-f]{2})*"
)


class ConfigError(ValueError):
    """An invalid configuration; the message names the field and never contains its value."""


class Queue(Record):
    """How events are batched and retried. Times in seconds."""

    max_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    max_coalescing_delay: Annotated[float, Field(ge=0, le=3600)] = 1.0
    initial_retry_delay: Annotated[float, Field(gt=0)] = 0.01
    max_retry_delay: Annotated[float, Field(gt=0)] = 60.0
    concurrency_limit: Literal[-1, 1] = 1


class PluginConfig(Record):
    """One instance's configuration, with the names of Kong's own plugin; `timeout` and `keepalive` in ms."""

    ingest_endpoint: str
    api_token: SecretStr | None = None
    meter_api_requests: bool = True
    meter_ai_token_usage: bool = True
    # None is the default of AiRules: a default here would have to stand in Kong's schema, where a control
    # plane fills it in and an older data plane rejects it.
    ai_tokens: Literal["kong", "split"] | None = None
    ai_cache_hits: Literal["bill", "mark", "skip"] | None = None
    meter_ai_calls: bool | None = None
    meter_agent_requests: bool | None = None
    subject: Subject = Subject()
    subject_prefixes: SubjectPrefixesConfig = SubjectPrefixesConfig()
    attributes: Annotated[tuple[AttributeConfig, ...], LuaList] = ()
    units: Annotated[tuple[UnitConfig, ...], LuaList] = ()
    ssl_verify: bool = True
    timeout: Annotated[float, Field(gt=0)] = 10_000
    keepalive: Annotated[float, Field(ge=0)] = 60_000
    queue: Queue = Queue()
    source: Annotated[str, Field(min_length=1, max_length=256)] = "kong"
    meter_anonymous_consumer: bool = False
    application_context: Literal["when_needed", "always", "never"] = "when_needed"
    filters: FiltersConfig = FiltersConfig()
    allow_status_codes: Annotated[tuple[Text | int, ...], LuaList] | None = None

    @field_validator("allow_status_codes")
    @classmethod
    def _is_the_only_filter_of_statuses(
        cls, value: tuple[Text | int, ...] | None, info: ValidationInfo
    ) -> tuple[Text | int, ...] | None:
        filters = info.data.get("filters")
        if value and filters is not None and filters.statuses:
            raise ValueError("is the same filter as filters.statuses: set one of the two, not both")
        FiltersConfig(statuses=value or None).compiled()
        return value

    def _filters(self) -> Filters | None:
        """Return the compiled filters; `allow_status_codes` is Kong's name (3.16) for `filters.statuses`."""
        if not self.allow_status_codes:
            return self.filters.compiled()
        return self.filters.model_copy(update={"statuses": self.allow_status_codes}).compiled()

    @field_validator("ingest_endpoint")
    @classmethod
    def _is_an_http_url(cls, value: str) -> str:
        return usable_endpoint(value)

    @field_validator("source")
    @classmethod
    def _is_a_uri_reference(cls, value: str) -> str:
        if not _URI_REFERENCE.fullmatch(value):
            raise ValueError(
                "must be a URI reference, such as kong or urn:kong:eu; host:port is none, //host:port is"
            )
        return value

    @field_validator("units")
    @classmethod
    def _have_names_of_their_own(
        cls, value: tuple[UnitConfig, ...], info: ValidationInfo
    ) -> tuple[UnitConfig, ...]:
        names = [a.event_property_name for a in info.data.get("attributes", ())]
        for unit in value:
            if unit.name in names:
                raise ValueError(f"the name {unit.name!r} is taken by an attribute or another unit")
            names.append(unit.name)
        return value

    @field_validator("api_token")
    @classmethod
    def _fits_in_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        token = value.get_secret_value().strip() if value else ""
        if not is_header_value(token):
            raise ValueError("must be printable ASCII in one line, to be sent in a header")
        return SecretStr(token) if token and not is_reference(token) else None

    def rules(self) -> Rules:
        """Return the rules that decide the events."""
        return Rules(
            source=self.source,
            meter_api_requests=self.meter_api_requests,
            ai=AiRules(
                token_usage=self.meter_ai_token_usage,
                tokens=self.ai_tokens or "kong",
                cache_hits=self.ai_cache_hits or "mark",
                calls=self.meter_ai_calls is True,
                agent_requests=self.meter_agent_requests is not False,
                units=tuple(unit.compiled() for unit in self.units),
            ),
            meter_anonymous_consumer=self.meter_anonymous_consumer,
            prefixes=self.subject_prefixes.compiled(),
            lookups=self.subject.lookups,
            require_consumer=self.subject.require_consumer,
            missing=self.subject.missing,
            fallback_subject=self.subject.fallback_subject or "",
            attributes=tuple(a.compiled() for a in self.attributes),
            filters=self._filters(),
            application_context=self.application_context,
        )


def usable_endpoint(value: str) -> str:
    """Return the URL, stripped; the ValueError says what is wrong with it."""
    value = value.strip()  # secret stores often append a line break
    if not value.isprintable() or " " in value:
        raise ValueError("must be a URL without spaces and line breaks")
    url = _split(value)
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("must be an http or https URL with a host")
    if url.username or url.password or url.query:
        raise ValueError("must not contain credentials or a query; the token belongs in api_token")
    return value


def _split(url: str) -> SplitResult | None:
    """Return the parts of the URL, or None if it is invalid: urlsplit's own errors would show its content."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - the port is parsed on access
    except ValueError:
        return None
    return parts


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return Kong's configuration JSON as a dict; raises ConfigError if it is not an object."""
    try:
        config = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ConfigError("the configuration is not JSON") from error
    if not isinstance(config, dict):
        raise ConfigError("the configuration is not an object")
    return config


def token_reference(config: dict[str, Any]) -> str | None:
    """Return the vault reference of the API token, which Kong sends along with the resolved token.

    Where nothing has resolved it, it is the token itself.
    """
    references = config.get("$refs")
    reference = references.get("api_token") if isinstance(references, dict) else None
    if not reference and is_reference(token := config.get("api_token")):
        reference = token.strip()
    return str(reference) if reference else None


def is_reference(value: object) -> TypeGuard[str]:
    """Return whether a value is a vault reference instead of a secret."""
    return isinstance(value, str) and value.strip().startswith("{vault://") and value.strip().endswith("}")


def parse_config(config: dict[str, Any]) -> tuple[PluginConfig, Rules]:
    """Return the configuration and its rules; the ConfigError names every invalid field."""
    try:
        parsed = PluginConfig.model_validate(_without_nulls(config))
    except ValidationError as error:
        raise ConfigError(describe_errors(error)) from None
    return parsed, parsed.rules()


def describe_errors(error: ValidationError, within: str = "") -> str:
    """Return the fields and what is wrong with them; never values, which may be secrets."""
    prefix = (within,) if within else ()
    return "; ".join(
        f"{'.'.join(map(str, (*prefix, *found['loc']))) or 'configuration'}: {_message(found)}"
        for found in error.errors(include_input=False, include_url=False, include_context=False)
    )


def _message(found: Mapping[str, Any]) -> str:
    return _MESSAGES.get(found["type"]) or str(found["msg"]).removeprefix("Value error, ")


_MESSAGES: Final = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "extra_forbidden": "there is no such setting",
}
"""Replacements for messages of pydantic that use Python's terms."""


def _without_nulls(value: Any) -> Any:
    """Return the value without null members: Kong may write an unset field as null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def ineffective_queue_keys(config: dict[str, Any]) -> list[str]:
    """Return the settings that are set and would make Kong's queue drop events, but have no effect here."""
    queue = config.get("queue")
    return (
        [key for key in DROPPING_QUEUE_KEYS if queue.get(key) is not None] if isinstance(queue, dict) else []
    )
