"""Rules: the part of an instance's configuration that decides its events, compiled when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from openmeter_plugin.metering.ai_events import DEFAULT_AI_RULES, AiRules

SubjectPlace = Literal["application", "consumer", "header", "query"]

AttributePlace = Literal["header", "query", "response_header", "path_capture", "consumer_tag", "constant"]

Missing = Literal["skip", "fallback", "quarantine"]


class SkipReason(StrEnum):
    """Why a request has no event. The values are labels of counters and metrics."""

    NO_CONSUMER = "no_consumer"
    ANONYMOUS_CONSUMER = "anonymous_consumer"
    CONSUMER_WITHOUT_FIELD = "consumer_without_field"
    AMBIGUOUS_CUSTOMER_TAG = "ambiguous_customer_tag"
    CONSUMER_REQUIRED = "consumer_required"
    NO_APPLICATION = "no_application"
    NO_HEADER = "no_header"
    NO_QUERY_ARGUMENT = "no_query_argument"
    STATUS_EXCLUDED = "status_excluded"
    METHOD_EXCLUDED = "method_excluded"
    ROUTE_EXCLUDED = "route_excluded"
    SERVICE_EXCLUDED = "service_excluded"
    RESPONSE_SOURCE_EXCLUDED = "response_source_excluded"
    UNANSWERED_EXCLUDED = "unanswered_excluded"
    GATE_STOPPED = "gate_stopped"
    NOTHING_TO_METER = "nothing_to_meter"
    AI_STATISTICS_OFF = "ai_statistics_off"
    BAD_RECORD = "bad_record"


PrincipalKind = Literal["consumer", "application"]

_MAX_PREFIX = 64


@dataclass(frozen=True, slots=True)
class SubjectPrefixes:
    """What precedes the id in a default subject. The defaults are those of Kong's own plugins (3.16).

    Raises ValueError for prefixes that a consumer and an application could share.
    """

    consumer: str = "consumer:"
    application: str = "app:"

    def __post_init__(self) -> None:
        for name, prefix in (("consumer", self.consumer), ("application", self.application)):
            if not 0 < len(prefix) <= _MAX_PREFIX or not prefix.isprintable() or " " in prefix:
                raise ValueError(
                    f"{name} must be 1 to {_MAX_PREFIX} characters without spaces, such as 'app:'"
                )
        if self.consumer.startswith(self.application) or self.application.startswith(self.consumer):
            raise ValueError(
                "consumer and application must differ, and neither may begin with the other: both kinds could"
                " get the same subject"
            )

    def subject(self, kind: PrincipalKind, principal_id: str) -> str:
        """Return the subject of a principal for which no field is configured. An id survives renames."""
        return (self.consumer if kind == "consumer" else self.application) + principal_id


DEFAULT_PREFIXES = SubjectPrefixes()


@dataclass(frozen=True, slots=True)
class Lookup:
    """One place to look for the subject; `field` is validated and, for headers, in lower case."""

    place: SubjectPlace
    field: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """The source of the event property `property_name`.

    `name` is the name of the header (in lower case), argument, capture or tag; for a constant, the value.
    """

    place: AttributePlace
    name: str
    property_name: str


@dataclass(frozen=True, slots=True)
class Filters:
    """Which requests are metered; None or False if a field does not restrict that."""

    statuses: frozenset[int] | None = None
    methods: frozenset[str] | None = None
    routes: frozenset[str] | None = None
    services: frozenset[str] | None = None
    response_sources: frozenset[str] | None = None
    upstream_answered: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """The compiled rules of one instance."""

    source: str
    meter_api_requests: bool = True
    ai: AiRules = DEFAULT_AI_RULES
    meter_anonymous_consumer: bool = False
    prefixes: SubjectPrefixes = DEFAULT_PREFIXES
    lookups: tuple[Lookup, ...] = (Lookup("consumer", "id"), Lookup("application", "id"))
    require_consumer: bool = False
    missing: Missing = "skip"
    fallback_subject: str = ""
    attributes: tuple[Attribute, ...] = ()
    filters: Filters | None = None
    application_context: Literal["when_needed", "always", "never"] = "when_needed"
    queries_captures: bool = field(init=False, compare=False)
    reads_ai: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        queries = any(attribute.place == "path_capture" for attribute in self.attributes)
        object.__setattr__(self, "queries_captures", queries)
        object.__setattr__(self, "reads_ai", self.ai.token_usage or self.ai.agent_requests)
