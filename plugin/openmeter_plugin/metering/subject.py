"""The subject of a request: who pays for it, by the first configured lookup that finds someone.

syncd uses the same `SubjectPrefixes` and `tagged_customers`: the plugin writes a subject into every event and
syncd into every customer's usage attribution, and the two must agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from openmeter_plugin.metering.kong_log import NOT_QUERIED, KongLog, PdkQuery, members
from openmeter_plugin.metering.lenient_json import MAX_TEXT, first, identifier, json_object
from openmeter_plugin.metering.rules import Rules, SkipReason

CUSTOMER_TAG: Final = "customer:"
"""The tag ``customer:<key>`` assigns a consumer to the customer with that key."""


def tagged_customers(tags: Iterable[object]) -> set[str]:
    """Return the customer keys in a consumer's tags. More than one, or an empty one, means no customer."""
    return {
        tag[len(CUSTOMER_TAG) :].strip()
        for tag in tags
        if isinstance(tag, str) and tag.startswith(CUSTOMER_TAG)
    }


def find_subject(log: KongLog, application: object, rules: Rules) -> str | SkipReason | PdkQuery:
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
            found = _application_subject(application, lookup.field, rules)
        else:
            found = _client_subject(log, place == "header", lookup.field, rules)
        if type(found) is str:
            return found
        first_reason = first_reason or SkipReason(found)
    return first_reason or SkipReason.NO_CONSUMER


def is_anonymous(log: KongLog) -> bool:
    """Return whether the consumer is an authentication plugin's `anonymous` fallback.

    All three conditions are required: a client can send the header itself, but then Kong has an
    authenticated entity, and an authenticated request must never go unbilled.
    """
    if log.authenticated_entity or log.consumer is None or log.request is None:
        return False
    return members(log.request.headers).get("x-anonymous-consumer") == "true"


def _consumer_subject(log: KongLog, field: str, rules: Rules) -> str | SkipReason:
    consumer = log.consumer
    if consumer is None or (consumer_id := consumer.id) is None or len(consumer_id) > MAX_TEXT:
        return SkipReason.NO_CONSUMER
    if not (log.authenticated_entity or rules.meter_anonymous_consumer) and is_anonymous(log):
        return SkipReason.ANONYMOUS_CONSUMER
    if field == "id":
        return rules.prefixes.consumer + consumer_id
    if field == "tag":
        return tagged_customer(consumer.tags)
    value = consumer.custom_id if field == "custom_id" else consumer.username
    return identifier(value) or SkipReason.CONSUMER_WITHOUT_FIELD


def tagged_customer(tags: object) -> str | SkipReason:
    """Return the customer key in a consumer's tags, or why there is none."""
    keys = tagged_customers(tags) if type(tags) is list else set()
    if not keys:
        return SkipReason.CONSUMER_WITHOUT_FIELD
    key = keys.pop()
    # With two customers neither is billed: syncd attaches such a consumer to none, too.
    return SkipReason.AMBIGUOUS_CUSTOMER_TAG if keys else identifier(key) or SkipReason.CONSUMER_WITHOUT_FIELD


def _application_subject(application: object, field: str, rules: Rules) -> str | SkipReason:
    context = json_object(application)
    if field != "id":
        return identifier(context.get(field)) or SkipReason.NO_APPLICATION
    application_id = identifier(context.get("application_id"))
    return rules.prefixes.application + application_id if application_id else SkipReason.NO_APPLICATION


def _client_subject(log: KongLog, is_header: bool, name: str, rules: Rules) -> str | SkipReason:
    """Return the subject that the client sent in a header or query argument, if it may be trusted."""
    missing = SkipReason.NO_HEADER if is_header else SkipReason.NO_QUERY_ARGUMENT
    request = log.request
    if request is None:
        return missing
    found = identifier(first(members(request.headers if is_header else request.querystring).get(name)))
    if found is None:
        return missing
    if rules.require_consumer and not _is_authenticated(log):
        return SkipReason.CONSUMER_REQUIRED
    return found


def _is_authenticated(log: KongLog) -> bool:
    return log.consumer is not None and identifier(log.consumer.id) is not None and not is_anonymous(log)
