"""The subject of a request: who pays for it, by the first configured lookup that finds someone.

syncd imports `default_subject` and `tagged_customers` from here: the plugin writes a subject into every
event and syncd into every customer's usage attribution, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from openmeter_plugin.metering.lenient_json import first, identifier, json_object
from openmeter_plugin.metering.pdk_queries import NOT_QUERIED, PdkQuery
from openmeter_plugin.metering.rules import Rules, SkipReason

PrincipalKind = Literal["consumer", "application"]

CUSTOMER_TAG: Final = "customer:"
"""The tag ``customer:<key>`` assigns a consumer to the customer with that key."""


def default_subject(kind: PrincipalKind, principal_id: str) -> str:
    """Return the subject if no field is configured: ``consumer:<id>`` or ``application:<id>``.

    The prefix keeps the two kinds apart, and the id survives renames. Kong's own plugin documents the same
    form.
    """
    return f"{kind}:{principal_id}"


def tagged_customers(tags: Iterable[object]) -> set[str]:
    """Return the customer keys in a consumer's tags. More than one, or an empty one, means no customer."""
    return {
        tag[len(CUSTOMER_TAG) :].strip()
        for tag in tags
        if isinstance(tag, str) and tag.startswith(CUSTOMER_TAG)
    }


def find_subject(log: Mapping[str, Any], application: object, rules: Rules) -> str | SkipReason | PdkQuery:
    """Return the subject, or why there is none, or the PDK query that must come first.

    The reason is that of the first lookup.
    """
    first_reason: SkipReason | None = None
    for lookup in rules.lookups:
        place = lookup.place
        found: str | SkipReason
        if place == "consumer":
            found = _consumer_subject(log, lookup.field, rules)
        elif place == "application":
            if application is NOT_QUERIED:
                if rules.application_context != "never":
                    return PdkQuery.APPLICATION
                application = None
            found = _application_subject(application, lookup.field)
        else:
            found = _client_subject(log, place == "header", lookup.field, rules)
        if not isinstance(found, SkipReason):
            return found
        first_reason = first_reason or found
    return first_reason or SkipReason.NO_CONSUMER


def is_anonymous(log: Mapping[str, Any]) -> bool:
    """Return whether the consumer is an authentication plugin's `anonymous` fallback.

    All three conditions are required: a client can send the header itself, but then Kong has an
    authenticated entity, and an authenticated request must never go unbilled.
    """
    if log.get("authenticated_entity") or not log.get("consumer"):
        return False
    headers = json_object(json_object(log.get("request")).get("headers"))
    return headers.get("x-anonymous-consumer") == "true"


def _consumer_subject(log: Mapping[str, Any], field: str, rules: Rules) -> str | SkipReason:
    consumer = json_object(log.get("consumer"))
    consumer_id = identifier(consumer.get("id"))
    if consumer_id is None:
        return SkipReason.NO_CONSUMER
    if not rules.meter_anonymous_consumer and is_anonymous(log):
        return SkipReason.ANONYMOUS_CONSUMER
    if field == "id":
        return default_subject("consumer", consumer_id)
    if field == "tag":
        return tagged_customer(consumer.get("tags"))
    return identifier(consumer.get(field)) or SkipReason.CONSUMER_WITHOUT_FIELD


def tagged_customer(tags: object) -> str | SkipReason:
    """Return the customer key in a consumer's tags, or why there is none."""
    keys = tagged_customers(tags) if type(tags) is list else set()
    if not keys:
        return SkipReason.CONSUMER_WITHOUT_FIELD
    key = keys.pop()
    # With two customers neither is billed: syncd attaches such a consumer to none, too.
    return SkipReason.AMBIGUOUS_CUSTOMER_TAG if keys else identifier(key) or SkipReason.CONSUMER_WITHOUT_FIELD


def _application_subject(application: object, field: str) -> str | SkipReason:
    context = json_object(application)
    if field != "id":
        return identifier(context.get(field)) or SkipReason.NO_APPLICATION
    application_id = identifier(context.get("application_id"))
    return default_subject("application", application_id) if application_id else SkipReason.NO_APPLICATION


def _client_subject(log: Mapping[str, Any], is_header: bool, name: str, rules: Rules) -> str | SkipReason:
    """Return the subject that the client sent in a header or query argument, if it may be trusted."""
    request = json_object(log.get("request"))
    found = identifier(first(json_object(request.get("headers" if is_header else "querystring")).get(name)))
    if found is None:
        return SkipReason.NO_HEADER if is_header else SkipReason.NO_QUERY_ARGUMENT
    if rules.require_consumer and not _is_authenticated(log):
        return SkipReason.CONSUMER_REQUIRED
    return found


def _is_authenticated(log: Mapping[str, Any]) -> bool:
    return identifier(json_object(log.get("consumer")).get("id")) is not None and not is_anonymous(log)
