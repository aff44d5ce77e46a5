"""Subject lookups: consumer, application, header and query, their order, and the skip reasons."""

from __future__ import annotations

import pytest

from openmeter_plugin.metering.kong_log import NOT_QUERIED, PdkQuery
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.rules import Lookup, Missing, Rules, SkipReason, SubjectPrefixes
from tests.harness.recordings import application_request, llm_request, serialized
from tests.plugin.outcomes import ALICE, APPLICATION, CONTEXT, authenticated, looking, only, result


@pytest.mark.parametrize(("field", "subject"), [("username", "alice"), ("custom_id", "cust-alice-001")])
def test_a_consumers_name_or_custom_id_is_the_bare_subject(field: str, subject: str) -> None:
    assert only(authenticated(), None, looking(Lookup("consumer", field)))["subject"] == subject


def test_a_consumer_without_the_field_has_that_skip_reason() -> None:
    rules = looking(Lookup("consumer", "custom_id"))
    assert result(llm_request().parsed, None, rules) is SkipReason.CONSUMER_WITHOUT_FIELD


def test_a_header_is_the_subject_if_configured() -> None:
    assert only(authenticated(), None, looking(Lookup("header", "x-consumer-username")))["subject"] == "alice"


def test_the_first_of_a_repeated_header_is_the_subject() -> None:
    log = authenticated()
    log["request"]["headers"]["x-customer"] = ["acme", "other"]
    assert only(log, None, looking(Lookup("header", "x-customer")))["subject"] == "acme"


def test_the_first_of_a_repeated_query_argument_is_the_subject() -> None:
    assert only(authenticated(), None, looking(Lookup("query", "b")))["subject"] == "x y"
    assert only(authenticated(), None, looking(Lookup("query", "a")))["subject"] == "1"


def test_a_query_argument_without_a_value_is_no_subject() -> None:
    rules = looking(Lookup("query", "flag"))
    assert result(authenticated(), None, rules) is SkipReason.NO_QUERY_ARGUMENT


def test_a_missing_header_has_that_skip_reason() -> None:
    assert result(authenticated(), None, looking(Lookup("header", "x-none"))) is SkipReason.NO_HEADER


@pytest.mark.parametrize("field", ["developer_id", "portal_id", "organization_id"])
def test_an_applications_other_ids_are_the_bare_subject(field: str) -> None:
    event = only(application_request().parsed, CONTEXT, looking(Lookup("application", field)))
    assert event["subject"] == CONTEXT[field]


@pytest.mark.parametrize("context", [None, {}, [], "x", 1.0, {"application_id": 3}, {"application_id": ""}])
def test_a_context_without_an_application_has_that_skip_reason(context: object) -> None:
    assert result(authenticated(), context, looking(Lookup("application", "id"))) is SkipReason.NO_APPLICATION


def test_the_first_lookup_that_finds_a_subject_decides() -> None:
    found = {
        "header": looking(Lookup("header", "x-consumer-username"), Lookup("consumer", "id")),
        "consumer": looking(Lookup("header", "x-none"), Lookup("consumer", "id"), Lookup("query", "a")),
        "query": looking(Lookup("header", "x-none"), Lookup("query", "a"), Lookup("consumer", "id")),
    }
    subjects = {place: only(authenticated(), None, rules)["subject"] for place, rules in found.items()}
    assert subjects == {"header": "alice", "consumer": f"consumer:{ALICE}", "query": "1"}


def test_the_skip_reason_is_that_of_the_first_lookup() -> None:
    rules = looking(Lookup("header", "x-none"), Lookup("query", "none"))
    assert result(authenticated(), None, rules) is SkipReason.NO_HEADER


def test_a_name_that_is_too_long_is_no_subject_and_not_cut() -> None:
    log = authenticated()
    log["request"]["headers"]["x-customer"] = "c" * (MAX_TEXT + 1)
    assert result(log, None, looking(Lookup("header", "x-customer"))) is SkipReason.NO_HEADER
    log["request"]["headers"]["x-customer"] = "c" * MAX_TEXT
    assert only(log, None, looking(Lookup("header", "x-customer")))["subject"] == "c" * MAX_TEXT


def test_the_application_is_queried_only_without_a_consumer() -> None:
    assert isinstance(result(authenticated(), NOT_QUERIED), list)
    assert result(serialized("401-no-key").parsed, NOT_QUERIED) is PdkQuery.APPLICATION


def test_the_application_is_always_queried_if_configured() -> None:
    rules = Rules(source="kong-test", application_context="always")
    assert result(authenticated(), NOT_QUERIED, rules) is PdkQuery.APPLICATION
    assert only(authenticated(), CONTEXT, rules)["data"]["application_id"] == APPLICATION


def test_the_application_is_never_queried_if_configured() -> None:
    rules = Rules(source="kong-test", application_context="never")
    assert result(serialized("401-no-key").parsed, NOT_QUERIED, rules) is SkipReason.NO_CONSUMER
    rules = looking(Lookup("application", "id"), application_context="never")
    assert result(serialized("401-no-key").parsed, NOT_QUERIED, rules) is SkipReason.NO_APPLICATION


def test_an_anonymous_consumer_is_metered_if_configured() -> None:
    rules = Rules(source="kong-test", meter_anonymous_consumer=True)
    event = only(serialized("anonymous-consumer").parsed, None, rules)
    assert event["subject"] == "consumer:1cd57acc-61b9-5afa-9668-80123fa9b98d"


def test_an_anonymous_consumers_application_pays() -> None:
    event = only(serialized("anonymous-consumer").parsed, CONTEXT)
    assert event["subject"] == f"app:{APPLICATION}"


def test_an_authenticated_client_that_calls_itself_anonymous_is_billed() -> None:
    log = authenticated()
    log["request"]["headers"]["x-anonymous-consumer"] = "true"
    assert only(log)["subject"] == f"consumer:{ALICE}"


def test_a_consumer_without_credential_and_anonymous_header_is_billed() -> None:
    log = authenticated()
    del log["authenticated_entity"]
    assert only(log)["subject"] == f"consumer:{ALICE}"


@pytest.mark.parametrize("header", ["false", "TRUE", "1", "", ["true"]])
def test_only_the_exact_value_that_kong_writes_makes_a_consumer_anonymous(header: object) -> None:
    log = authenticated()
    del log["authenticated_entity"]
    log["request"]["headers"]["x-anonymous-consumer"] = header
    assert only(log)["subject"] == f"consumer:{ALICE}"


@pytest.mark.parametrize("missing", ["skip", "fallback", "quarantine"])
def test_a_request_without_subject_and_usage_is_skipped_under_every_policy(
    missing: Missing,
) -> None:
    rules = Rules(
        source="kong-test", meter_api_requests=False, missing=missing, fallback_subject="unassigned"
    )
    assert result(serialized("401-no-key").parsed, None, rules) is SkipReason.NO_CONSUMER


def test_the_prefixes_of_default_subjects_are_those_of_the_configuration() -> None:
    rules = Rules(source="kong-test", prefixes=SubjectPrefixes("user/", "application:"))
    assert only(authenticated(), None, rules)["subject"] == f"user/{ALICE}"
    assert only(application_request().parsed, CONTEXT, rules)["subject"] == f"application:{APPLICATION}"


@pytest.mark.parametrize(
    ("consumer", "application", "problem"),
    [
        ("a:", "a:", "neither may begin with the other"),
        ("a", "app:", "neither may begin with the other"),
        ("consumer:", "c", "neither may begin with the other"),
        ("", "app:", "consumer must be 1 to 64 characters"),
        ("consumer:", "", "application must be 1 to 64 characters"),
        ("consumer:", "an app:", "application must be 1 to 64 characters"),
        ("consumer:", "app\n", "application must be 1 to 64 characters"),
        ("c" * 65, "app:", "consumer must be 1 to 64 characters"),
    ],
)
def test_prefixes_that_could_make_two_principals_one_subject_are_refused(
    consumer: str, application: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        SubjectPrefixes(consumer, application)
