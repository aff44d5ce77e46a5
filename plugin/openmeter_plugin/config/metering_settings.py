"""Metering settings: subject, attributes and filters, validated and compiled into `metering.rules`.

This happens once, when the instance starts.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from openmeter_plugin.metering.ai_events import AI_PROPERTIES, Unit, compile_unit
from openmeter_plugin.metering.event import RESERVED_DATA_KEYS
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.rules import (
    Attribute,
    AttributePlace,
    Filters,
    Lookup,
    Missing,
    SubjectPlace,
    SubjectPrefixes,
)

SECRET_REQUEST_HEADERS: Final = frozenset(
    {
        *("apikey", "api-key", "x-api-key", "x-auth-token", "x-access-token"),
        *("authorization", "proxy-authorization", "cookie", "set-cookie"),
    }
)
SECRET_RESPONSE_HEADERS: Final = SECRET_REQUEST_HEADERS | {
    *("set-cookie2", "www-authenticate", "proxy-authenticate"),
    *("authentication-info", "proxy-authentication-info"),
}
SECRET_ARGUMENTS: Final = frozenset(
    {
        *("apikey", "api_key", "api-key", "key", "token", "access_token", "refresh_token", "id_token"),
        *("jwt", "client_secret", "password"),
    }
)

CONSUMER_FIELDS: Final = ("id", "username", "custom_id", "tag")
APPLICATION_FIELDS: Final = ("id", "developer_id", "portal_id", "organization_id")

_STATUSES: Final = re.compile(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", re.ASCII)


def _lua_list(value: Any) -> Any:
    """Turn {} into []: Lua has one empty table, and Kong's JSON encoder may write an empty list as {}."""
    return [] if value == {} else value


Text = Annotated[str, Field(min_length=1)]
LuaList = BeforeValidator(_lua_list)
Texts = Annotated[tuple[Text, ...], LuaList, Field(min_length=1)]


class Record(BaseModel):
    """Base of the configuration models."""

    # Kong adds fields of its own, such as __seq__ and __plugin_id, and newer schemas may add more.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class SubjectLookup(Record):
    """Where to look for the subject: a place, and the field, header or argument in it."""

    look_up_value_in: SubjectPlace = "consumer"
    field: Text | None = None

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Lookup:
        """Return the compiled lookup; raises ValueError if the place has no such field."""
        place, field = self.look_up_value_in, self.field
        if place == "consumer":
            field = field or "id"
            if field not in CONSUMER_FIELDS:
                raise ValueError(f"a consumer has the fields {', '.join(CONSUMER_FIELDS)}")
        elif place == "application":
            field = (field or "id").removeprefix("application_") or "id"
            if field not in APPLICATION_FIELDS:
                raise ValueError(f"an application has the fields {', '.join(APPLICATION_FIELDS)}")
        elif field is None:
            raise ValueError(f"look_up_value_in: {place} needs a field, the name to look for")
        else:
            field = _public_name(place, field)
        return Lookup(place, field)


class Subject(SubjectLookup):
    """Who pays for a request: the first of the lookups that finds someone."""

    fallbacks: Annotated[tuple[SubjectLookup, ...], LuaList] = (
        SubjectLookup(look_up_value_in="application"),
    )
    require_consumer: bool = False
    missing: Missing = "skip"
    fallback_subject: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None

    @model_validator(mode="after")
    def _names_its_fallback(self) -> Self:
        if self.missing == "fallback" and self.fallback_subject is None:
            raise ValueError("missing: fallback needs a fallback_subject")
        return self

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The lookups in order, without duplicates."""
        return tuple(dict.fromkeys(s.compiled() for s in (self, *self.fallbacks)))


class SubjectPrefixesConfig(Record):
    """What precedes the id in a default subject; None is the default of `SubjectPrefixes`."""

    consumer: str | None = None
    application: str | None = None

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> SubjectPrefixes:
        """Return the prefixes; raises ValueError if they cannot keep consumers and applications apart."""
        return SubjectPrefixes(**self.model_dump(exclude_none=True))


class AttributeConfig(Record):
    """A value of a request that becomes a property of the event's data."""

    source: AttributePlace
    look_up_value_in: Text | None = None
    value: Text | None = None
    event_property_name: Text

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Attribute:
        """Return the compiled attribute; raises ValueError for names that must never reach an event."""
        if self.source == "constant":
            if self.value is None:
                raise ValueError("source: constant needs a value")
            return Attribute("constant", self.value, self.event_property_name)
        if self.look_up_value_in is None:
            raise ValueError(f"source: {self.source} needs look_up_value_in, the name to look for")
        name = _public_name(self.source, self.look_up_value_in)
        return Attribute(self.source, name, self.event_property_name)


class UnitConfig(Record):
    """A weighted unit: a quantity of each AI call, such as credits."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    expression: Text

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Unit:
        """Return the compiled unit; raises ValueError that names the column of an error."""
        if self.name in RESERVED_DATA_KEYS | AI_PROPERTIES:
            raise ValueError(f"name {self.name!r} is reserved for the plugin")
        return compile_unit(self.name, self.expression)


class FiltersConfig(Record):
    """Which requests are metered. A filter that is not set excludes nothing."""

    # YAML parses a single status as a number; in Kong's schema it is a string.
    statuses: Annotated[tuple[Text | int, ...], LuaList, Field(min_length=1)] | None = None
    methods: Texts | None = None
    routes: Texts | None = None
    services: Texts | None = None
    response_sources: (
        Annotated[tuple[Literal["kong", "upstream"], ...], LuaList, Field(min_length=1)] | None
    ) = None
    upstream_answered: bool | None = None

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> Filters | None:
        """Return the filters as sets, or None if there are none; raises ValueError for an invalid status."""
        statuses = (
            None
            if self.statuses is None
            else frozenset(s for text in self.statuses for s in _status_range(text))
        )
        methods = None if self.methods is None else frozenset(method.upper() for method in self.methods)
        routes, services, sources = (
            None if names is None else frozenset(names)
            for names in (self.routes, self.services, self.response_sources)
        )
        filters = Filters(statuses, methods, routes, services, sources, bool(self.upstream_answered))
        return None if filters == Filters() else filters


def _status_range(statuses: str | int) -> range:
    """Return the statuses in `404` or `200-299`; raises ValueError."""
    match = _STATUSES.fullmatch(str(statuses))
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not 0 < first <= last:
        raise ValueError("a status is a number such as 404 or a range such as 200-299, from 100 to 599")
    return range(first, last + 1)


def _public_name(place: str, name: str) -> str:
    """Return a name as Kong logs it (headers in lower case); raises ValueError if it carries credentials."""
    lowered = name.lower()
    if lowered in _SECRETS.get(place, ()):
        raise ValueError(f"{place} {name!r} carries credentials, which must never reach an event")
    return lowered if place in ("header", "response_header") else name


_SECRETS: Final = {
    "header": SECRET_REQUEST_HEADERS,
    "query": SECRET_ARGUMENTS,
    "response_header": SECRET_RESPONSE_HEADERS,
}
