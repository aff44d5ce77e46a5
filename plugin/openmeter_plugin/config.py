"""The plugin's configuration, as Kong hands it over in StartInstance.

Kong has validated it with our schema and filled in the defaults; it is validated again here because a
configuration may also come from a newer or older schema in the control plane, and a wrong one must be
named rather than guessed at.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import SplitResult, urlsplit

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from openmeter_plugin.event import RESERVED_DATA_KEYS, Attribute, Lookup, Rules
from openmeter_plugin.spool.destination import is_header_value

SECRET_HEADERS: Final = frozenset(
    {"apikey", "api-key", "x-api-key", "authorization", "proxy-authorization", "cookie", "set-cookie"}
)
SECRET_ARGUMENTS: Final = frozenset({"apikey", "api_key", "api-key", "key", "token", "access_token"})

DROPPING_QUEUE_KEYS: Final = ("max_retry_time", "max_entries", "max_bytes")
"""Keys of Kong's queue that make it drop what it cannot deliver. We keep it, so they have no effect."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and holds no value of it."""


class _Record(BaseModel):
    # Kong adds __seq__, __plugin_id and more of its own, and newer schemas may add fields.
    model_config = ConfigDict(extra="ignore", frozen=True)


class SubjectLookup(_Record):
    """Where to look for the subject: a place, and the field, header or argument in it."""

    look_up_value_in: Literal["application", "consumer", "header", "query"] = "consumer"
    field: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Lookup:
        """Return the lookup with its field checked; raises ValueError where the place has no such field."""
        place, field = self.look_up_value_in, self.field
        if place == "consumer":
            field = field or "id"
            if field not in ("id", "username", "custom_id"):
                raise ValueError("a consumer has the fields id, username and custom_id")
        elif place == "application":
            field = (field or "id").removeprefix("application_") or "id"
            if field not in ("id", "developer_id", "portal_id", "organization_id"):
                raise ValueError("an application has the fields id, developer_id, portal_id, organization_id")
        elif field is None:
            raise ValueError(f"look_up_value_in: {place} needs a field, the name to look for")
        else:
            field = _public_name(place, field)
        return Lookup(place, field)


class Subject(SubjectLookup):
    """Whom the usage is billed to: the first of the lookups that finds somebody."""

    fallbacks: tuple[SubjectLookup, ...] = (SubjectLookup(look_up_value_in="application"),)

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _lua_empty_list(cls, value: Any) -> Any:
        return [] if value == {} else value

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The lookups in their order, each once."""
        return tuple(dict.fromkeys(s.compiled() for s in (self, *self.fallbacks)))


class AttributeConfig(_Record):
    """A request header or query argument that becomes a property of the event's data."""

    source: Literal["header", "query"]
    look_up_value_in: Annotated[str, Field(min_length=1)]
    event_property_name: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Attribute:
        """Return the attribute with its name checked; raises ValueError for what must not reach an event."""
        if self.event_property_name in RESERVED_DATA_KEYS:
            raise ValueError(f"event_property_name {self.event_property_name!r} is one of the event's own")
        name = _public_name(self.source, self.look_up_value_in)
        return Attribute(self.source, name, self.event_property_name)


class Queue(_Record):
    """How events are batched and retried. Times in seconds."""

    max_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    max_coalescing_delay: Annotated[float, Field(ge=0, le=3600)] = 1.0
    initial_retry_delay: Annotated[float, Field(gt=0)] = 0.01
    max_retry_delay: Annotated[float, Field(gt=0)] = 60.0


class PluginConfig(_Record):
    """One instance's configuration. Kong's own names; `timeout` and `keepalive` in milliseconds."""

    ingest_endpoint: str
    api_token: SecretStr | None = None
    meter_api_requests: bool = True
    meter_ai_token_usage: bool = True
    subject: Subject = Subject()
    attributes: tuple[AttributeConfig, ...] = ()
    ssl_verify: bool = True
    timeout: Annotated[float, Field(gt=0)] = 10_000
    keepalive: Annotated[float, Field(ge=0)] = 60_000
    queue: Queue = Queue()
    source: Annotated[str, Field(min_length=1, max_length=256)] = "kong"
    meter_anonymous_consumer: bool = False
    application_context: Literal["when_needed", "always", "never"] = "when_needed"

    @field_validator("ingest_endpoint")
    @classmethod
    def _is_an_http_url(cls, value: str) -> str:
        url = _split(value)
        if url is None or url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("must be an http or https URL with a host")
        if url.username or url.password or url.query:
            raise ValueError("must not carry credentials or a query; the token goes into api_token")
        return value

    @field_validator("api_token")
    @classmethod
    def _fits_in_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # Secret stores like to put a line break behind it.
        token = value.get_secret_value().strip() if value else ""
        if not is_header_value(token):
            raise ValueError("must be printable ASCII, to be sent in a header")
        return SecretStr(token) if token else None

    @field_validator("attributes", mode="before")
    @classmethod
    def _lua_empty_list(cls, value: Any) -> Any:
        # Lua has one empty table; Kong's JSON encoder may write an empty list as {}.
        return [] if value == {} else value

    def rules(self) -> Rules:
        """Return what of the configuration decides the events."""
        return Rules(
            source=self.source,
            meter_api_requests=self.meter_api_requests,
            meter_ai_token_usage=self.meter_ai_token_usage,
            meter_anonymous_consumer=self.meter_anonymous_consumer,
            lookups=self.subject.lookups,
            attributes=tuple(a.compiled() for a in self.attributes),
            application_context=self.application_context,
        )


def _split(url: str) -> SplitResult | None:
    """Return the parts of the URL, None where it has none: urlsplit's own errors show what is in it."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - is looked at only now
    except ValueError:
        return None
    return parts


def _public_name(place: str, name: str) -> str:
    """Return a header's name as Kong logs it; raises ValueError for the name of a credential."""
    lowered = name.lower()
    if lowered in (SECRET_HEADERS if place == "header" else SECRET_ARGUMENTS):
        raise ValueError(f"{place} {name!r} carries credentials, which must never reach an event")
    return lowered if place == "header" else name


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return Kong's configuration JSON as a dict; raises ConfigError where it is not an object."""
    try:
        config = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ConfigError("the configuration is not JSON") from error
    if not isinstance(config, dict):
        raise ConfigError("the configuration is not an object")
    return config


def parse_config(config: dict[str, Any]) -> tuple[PluginConfig, Rules]:
    """Return the configuration and its rules; raises ConfigError that names each field that is wrong."""
    present = {key: value for key, value in config.items() if value is not None}
    try:
        parsed = PluginConfig.model_validate(present)
    except ValidationError as error:
        # Only places and reasons: the values may be secrets.
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}"
            for e in error.errors(include_input=False, include_url=False, include_context=False)
        )
        raise ConfigError(problems) from None
    return parsed, parsed.rules()


def ineffective_queue_keys(config: dict[str, Any]) -> list[str]:
    """Return the keys of Kong's queue that are set and would drop events there, but do not limit here."""
    queue = config.get("queue")
    return (
        [key for key in DROPPING_QUEUE_KEYS if queue.get(key) is not None] if isinstance(queue, dict) else []
    )
