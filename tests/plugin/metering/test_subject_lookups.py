"""Subjects from a consumer's tag, from the client, and requests without a subject."""

from __future__ import annotations

from typing import Any

import pytest

from openmeter_plugin.metering.event import Decision, Quarantined
from openmeter_plugin.metering.kong_log import NOT_QUERIED, PdkQuery
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.rules import Attribute, Filters, Lookup, Rules, SkipReason
from tests.harness.recordings import application_request, serialized
from tests.plugin.outcomes import APPLICATION, CONTEXT, authenticated, looking, only, result

TAG = Lookup("consumer", "tag")
HEADER = Lookup("header", "x-customer")
ARGUMENT = Lookup("query", "customer")


def tagged(*tags: object) -> dict[str, Any]:
    log = authenticated()
    log["consumer"]["tags"] = list(tags)
    return log


def naming(log: dict[str, Any], customer: str = "globex") -> dict[str, Any]:
    """Return the request with a customer that the client names."""
    log["request"]["headers"]["x-customer"] = customer
    log["request"]["querystring"]["customer"] = customer
    return log


# The consumer's tag


def test_the_key_in_the_consumers_customer_tag_is_the_bare_subject() -> None:
    event = only(tagged("beta", "customer:acme", "tier:gold"), None, looking(TAG))
    assert event["subject"] == "acme"
    assert event["data"]["consumer_username"] == "alice"


@pytest.mark.parametrize(
    "tags",
    [
        (),
        ("beta",),
        ("customer:",),
        ("customer: ",),
        ("Customer:acme",),
        (3, None),
        (f"customer:{'c' * 1025}",),
    ],
    ids=repr,
)
def test_a_consumer_without_a_valid_customer_tag_has_that_skip_reason(tags: tuple[object, ...]) -> None:
    assert result(tagged(*tags), None, looking(TAG)) is SkipReason.CONSUMER_WITHOUT_FIELD


@pytest.mark.parametrize("tags", [None, "customer:acme", {"customer:acme": True}, 5])
def test_tags_that_are_not_a_list_are_ignored(tags: object) -> None:
    log = authenticated()
    log["consumer"]["tags"] = tags
    assert result(log, None, looking(TAG)) is SkipReason.CONSUMER_WITHOUT_FIELD


@pytest.mark.parametrize("other", ["customer:globex", "customer:"])
def test_a_consumer_with_two_customer_tags_is_billed_to_neither(other: str) -> None:
    assert result(tagged("customer:acme", other), None, looking(TAG)) is SkipReason.AMBIGUOUS_CUSTOMER_TAG


def test_a_repeated_tag_is_one_customer_and_its_key_is_stripped() -> None:
    assert only(tagged("customer:acme", "customer: acme "), None, looking(TAG))["subject"] == "acme"


def test_a_consumer_without_the_tag_is_billed_by_the_next_lookup() -> None:
    log = authenticated()
    assert only(log, None, looking(TAG, Lookup("consumer", "username")))["subject"] == "alice"


def test_the_tag_of_an_anonymous_consumer_is_ignored() -> None:
    log = serialized("anonymous-consumer").parsed
    log["consumer"]["tags"] = ["customer:acme"]
    assert result(log, None, looking(TAG)) is SkipReason.ANONYMOUS_CONSUMER


# Subjects from the client


@pytest.mark.parametrize("lookup", [HEADER, ARGUMENT])
def test_a_client_may_name_a_customer_unless_a_consumer_is_required(lookup: Lookup) -> None:
    unauthenticated = naming(serialized("anonymous-no-auth-plugin").parsed)
    assert only(unauthenticated, None, looking(lookup))["subject"] == "globex"
    assert (
        result(unauthenticated, None, looking(lookup, require_consumer=True)) is SkipReason.CONSUMER_REQUIRED
    )


@pytest.mark.parametrize("lookup", [HEADER, ARGUMENT])
def test_an_authenticated_consumer_may_name_a_customer(lookup: Lookup) -> None:
    rules = looking(lookup, require_consumer=True)
    assert only(naming(authenticated()), None, rules)["subject"] == "globex"


@pytest.mark.parametrize("meter_anonymous_consumer", [False, True])
def test_the_anonymous_consumer_does_not_satisfy_require_consumer(meter_anonymous_consumer: bool) -> None:
    log = naming(serialized("anonymous-consumer").parsed)
    rules = looking(HEADER, require_consumer=True, meter_anonymous_consumer=meter_anonymous_consumer)
    assert result(log, None, rules) is SkipReason.CONSUMER_REQUIRED


def test_a_consumer_that_sends_the_anonymous_header_satisfies_require_consumer() -> None:
    log = naming(authenticated())
    log["request"]["headers"]["x-anonymous-consumer"] = "true"
    assert only(log, None, looking(HEADER, require_consumer=True))["subject"] == "globex"


def test_a_request_without_the_header_has_the_reason_no_header() -> None:
    log = serialized("anonymous-no-auth-plugin").parsed
    assert result(log, None, looking(HEADER, require_consumer=True)) is SkipReason.NO_HEADER


def test_the_next_lookup_decides_after_a_spoofed_header() -> None:
    log = naming(application_request().parsed)
    rules = looking(HEADER, Lookup("application", "id"), require_consumer=True)
    assert only(log, CONTEXT, rules)["subject"] == f"app:{APPLICATION}"


def test_require_consumer_does_not_apply_to_applications() -> None:
    rules = looking(Lookup("application", "id"), require_consumer=True)
    assert only(application_request().parsed, CONTEXT, rules)["subject"] == f"app:{APPLICATION}"


# No subject


def missing(**settings: Any) -> Rules:
    return looking(Lookup("consumer", "custom_id"), **settings)


WITHOUT_CONSUMER = serialized("anonymous-no-auth-plugin")


def test_a_request_without_a_subject_is_billed_to_the_fallback_if_configured() -> None:
    rules = missing(missing="fallback", fallback_subject="unassigned")
    assert only(WITHOUT_CONSUMER.parsed, None, rules)["subject"] == "unassigned"
    assert only(authenticated(), None, rules)["subject"] == "cust-alice-001"


def test_the_fallback_subject_is_used_after_all_lookups() -> None:
    rules = looking(
        Lookup("consumer", "id"),
        Lookup("application", "id"),
        missing="fallback",
        fallback_subject="unassigned",
    )
    assert result(WITHOUT_CONSUMER.parsed, NOT_QUERIED, rules) is PdkQuery.APPLICATION
    assert only(WITHOUT_CONSUMER.parsed, None, rules)["subject"] == "unassigned"
    assert only(WITHOUT_CONSUMER.parsed, CONTEXT, rules)["subject"] == f"app:{APPLICATION}"


@pytest.mark.parametrize(
    ("rules", "log", "reason"),
    [
        (missing(missing="quarantine"), WITHOUT_CONSUMER.parsed, SkipReason.NO_CONSUMER),
        (
            missing(missing="quarantine"),
            serialized("anonymous-consumer").parsed,
            SkipReason.ANONYMOUS_CONSUMER,
        ),
        (looking(TAG, missing="quarantine"), authenticated(), SkipReason.CONSUMER_WITHOUT_FIELD),
        (
            looking(HEADER, missing="quarantine", require_consumer=True),
            naming(WITHOUT_CONSUMER.parsed),
            SkipReason.CONSUMER_REQUIRED,
        ),
    ],
    ids=lambda value: value if isinstance(value, SkipReason) else "",
)
def test_a_request_without_a_subject_is_quarantined_with_its_reason_if_configured(
    rules: Rules, log: dict[str, Any], reason: SkipReason
) -> None:
    assert result(log, None, rules) == Quarantined(reason, {})


def test_a_quarantined_request_has_its_attributes_including_queried_ones() -> None:
    rules = missing(
        missing="quarantine",
        attributes=(Attribute("path_capture", "city", "city"), Attribute("header", "user-agent", "agent")),
    )
    assert result(WITHOUT_CONSUMER.parsed, None, rules, NOT_QUERIED) is PdkQuery.CAPTURES
    assert result(WITHOUT_CONSUMER.parsed, None, rules, {"named": {"city": "oslo"}}) == Quarantined(
        SkipReason.NO_CONSUMER, {"city": "oslo", "agent": "curl/7.88.1"}
    )


@pytest.mark.parametrize("policy", ["quarantine", "fallback"])
def test_a_request_without_usage_is_not_quarantined(policy: Any) -> None:
    rules = missing(missing=policy, fallback_subject="x", meter_api_requests=False)
    assert result(WITHOUT_CONSUMER.parsed, None, rules) is SkipReason.NO_CONSUMER


def test_a_bad_record_is_neither_billed_nor_quarantined() -> None:
    for policy in ("fallback", "quarantine"):
        decision: Decision = result([], None, Rules("k", missing=policy, fallback_subject="x"))
        assert decision is SkipReason.BAD_RECORD


def test_an_excluded_request_is_neither_billed_nor_quarantined_nor_queried() -> None:
    for policy in ("fallback", "quarantine"):
        rules = Rules(
            source="k",
            missing=policy,
            fallback_subject="x",
            filters=Filters(statuses=frozenset({200})),
            application_context="always",
        )
        assert result(serialized("401-no-key").parsed, NOT_QUERIED, rules) is SkipReason.STATUS_EXCLUDED


def test_a_tag_of_maximum_length_is_a_subject() -> None:
    key = "k" * MAX_TEXT
    assert only(tagged(f"customer:{key}"), None, looking(TAG))["subject"] == key
