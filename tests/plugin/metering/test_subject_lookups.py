"""Whom a request is billed to where the consumer's tag, a client's word or nobody at all decides it."""

from __future__ import annotations

from typing import Any

import pytest

from openmeter_plugin.metering.event import Decision, Quarantined
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.pdk_queries import NOT_QUERIED, PdkQuery
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
    """The request, with a client that says whose it is."""
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
def test_a_consumer_without_a_usable_customer_tag_is_counted_as_such(tags: tuple[object, ...]) -> None:
    assert result(tagged(*tags), None, looking(TAG)) is SkipReason.CONSUMER_WITHOUT_FIELD


@pytest.mark.parametrize("tags", [None, "customer:acme", {"customer:acme": True}, 5])
def test_tags_that_are_no_list_name_nobody(tags: object) -> None:
    log = authenticated()
    log["consumer"]["tags"] = tags
    assert result(log, None, looking(TAG)) is SkipReason.CONSUMER_WITHOUT_FIELD


@pytest.mark.parametrize("other", ["customer:globex", "customer:"])
def test_a_consumer_of_two_customers_is_billed_to_neither(other: str) -> None:
    assert result(tagged("customer:acme", other), None, looking(TAG)) is SkipReason.AMBIGUOUS_CUSTOMER_TAG


def test_a_tag_that_is_there_twice_is_one_customer_and_white_space_around_the_key_is_none_of_it() -> None:
    assert only(tagged("customer:acme", "customer: acme "), None, looking(TAG))["subject"] == "acme"


def test_a_consumer_without_the_tag_is_billed_by_the_next_lookup() -> None:
    log = authenticated()
    assert only(log, None, looking(TAG, Lookup("consumer", "username")))["subject"] == "alice"


def test_an_anonymous_consumers_tag_is_nobodys() -> None:
    log = serialized("anonymous-consumer").parsed
    log["consumer"]["tags"] = ["customer:acme"]
    assert result(log, None, looking(TAG)) is SkipReason.ANONYMOUS_CONSUMER


# What the client says


@pytest.mark.parametrize("lookup", [HEADER, ARGUMENT])
def test_a_client_that_names_a_customer_is_believed_unless_a_consumer_is_required(lookup: Lookup) -> None:
    nobody = naming(serialized("anonymous-no-auth-plugin").parsed)
    assert only(nobody, None, looking(lookup))["subject"] == "globex"
    assert result(nobody, None, looking(lookup, require_consumer=True)) is SkipReason.CONSUMER_REQUIRED


@pytest.mark.parametrize("lookup", [HEADER, ARGUMENT])
def test_an_authenticated_consumer_may_name_a_customer(lookup: Lookup) -> None:
    rules = looking(lookup, require_consumer=True)
    assert only(naming(authenticated()), None, rules)["subject"] == "globex"


@pytest.mark.parametrize("meter_anonymous_consumer", [False, True])
def test_the_anonymous_consumer_is_not_the_one_that_is_required(meter_anonymous_consumer: bool) -> None:
    log = naming(serialized("anonymous-consumer").parsed)
    rules = looking(HEADER, require_consumer=True, meter_anonymous_consumer=meter_anonymous_consumer)
    assert result(log, None, rules) is SkipReason.CONSUMER_REQUIRED


def test_a_client_that_sends_the_anonymous_header_itself_is_still_its_consumer() -> None:
    log = naming(authenticated())
    log["request"]["headers"]["x-anonymous-consumer"] = "true"
    assert only(log, None, looking(HEADER, require_consumer=True))["subject"] == "globex"


def test_a_request_that_names_nobody_lacks_the_header_and_not_the_consumer() -> None:
    log = serialized("anonymous-no-auth-plugin").parsed
    assert result(log, None, looking(HEADER, require_consumer=True)) is SkipReason.NO_HEADER


def test_a_spoofed_header_leaves_the_next_lookup_to_decide() -> None:
    log = naming(application_request().parsed)
    rules = looking(HEADER, Lookup("application", "id"), require_consumer=True)
    assert only(log, CONTEXT, rules)["subject"] == f"application:{APPLICATION}"


def test_consumers_and_applications_need_no_consumer_beside_them() -> None:
    rules = looking(Lookup("application", "id"), require_consumer=True)
    assert only(application_request().parsed, CONTEXT, rules)["subject"] == f"application:{APPLICATION}"


# Nobody found


def missing(**settings: Any) -> Rules:
    return looking(Lookup("consumer", "custom_id"), **settings)


NOBODYS = serialized("anonymous-no-auth-plugin")


def test_a_request_of_nobody_is_billed_to_the_fallback_subject_where_that_is_configured() -> None:
    rules = missing(missing="fallback", fallback_subject="unassigned")
    assert only(NOBODYS.parsed, None, rules)["subject"] == "unassigned"
    assert only(authenticated(), None, rules)["subject"] == "cust-alice-001"


def test_the_fallback_subject_is_used_after_all_lookups() -> None:
    rules = looking(
        Lookup("consumer", "id"),
        Lookup("application", "id"),
        missing="fallback",
        fallback_subject="unassigned",
    )
    assert result(NOBODYS.parsed, NOT_QUERIED, rules) is PdkQuery.APPLICATION
    assert only(NOBODYS.parsed, None, rules)["subject"] == "unassigned"
    assert only(NOBODYS.parsed, CONTEXT, rules)["subject"] == f"application:{APPLICATION}"


@pytest.mark.parametrize(
    ("rules", "log", "reason"),
    [
        (missing(missing="quarantine"), NOBODYS.parsed, SkipReason.NO_CONSUMER),
        (
            missing(missing="quarantine"),
            serialized("anonymous-consumer").parsed,
            SkipReason.ANONYMOUS_CONSUMER,
        ),
        (looking(TAG, missing="quarantine"), authenticated(), SkipReason.CONSUMER_WITHOUT_FIELD),
        (
            looking(HEADER, missing="quarantine", require_consumer=True),
            naming(NOBODYS.parsed),
            SkipReason.CONSUMER_REQUIRED,
        ),
    ],
    ids=lambda value: value if isinstance(value, SkipReason) else "",
)
def test_a_request_of_nobody_is_quarantined_with_its_reason_where_that_is_configured(
    rules: Rules, log: dict[str, Any], reason: SkipReason
) -> None:
    assert result(log, None, rules) == Quarantined(reason, {})


def test_a_quarantined_request_has_its_attributes_also_those_that_kong_is_asked_for() -> None:
    rules = missing(
        missing="quarantine",
        attributes=(Attribute("path_capture", "city", "city"), Attribute("header", "user-agent", "agent")),
    )
    assert result(NOBODYS.parsed, None, rules, NOT_QUERIED) is PdkQuery.CAPTURES
    assert result(NOBODYS.parsed, None, rules, {"named": {"city": "oslo"}}) == Quarantined(
        SkipReason.NO_CONSUMER, {"city": "oslo", "agent": "curl/7.88.1"}
    )


@pytest.mark.parametrize("policy", ["quarantine", "fallback"])
def test_a_request_without_anything_to_meter_is_not_kept_for_want_of_a_subject(policy: Any) -> None:
    rules = missing(missing=policy, fallback_subject="x", meter_api_requests=False)
    assert result(NOBODYS.parsed, None, rules) is SkipReason.NO_CONSUMER


def test_a_bad_record_is_neither_billed_to_the_fallback_nor_kept() -> None:
    for policy in ("fallback", "quarantine"):
        outcome: Decision = result([], None, Rules("k", missing=policy, fallback_subject="x"))
        assert outcome is SkipReason.BAD_RECORD


def test_what_a_filter_excludes_is_neither_billed_to_the_fallback_nor_kept_nor_asked_about() -> None:
    for policy in ("fallback", "quarantine"):
        rules = Rules(
            source="k",
            missing=policy,
            fallback_subject="x",
            filters=Filters(statuses=frozenset({200})),
            application_context="always",
        )
        assert result(serialized("401-no-key").parsed, NOT_QUERIED, rules) is SkipReason.STATUS_EXCLUDED


def test_a_tag_of_the_greatest_length_is_a_subject() -> None:
    key = "k" * MAX_TEXT
    assert only(tagged(f"customer:{key}"), None, looking(TAG))["subject"] == key
