"""Any log has a valid and deterministic decision."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings

from openmeter_plugin.metering.kong_log import PdkQuery, QueryResults
from openmeter_plugin.metering.rules import Rules
from tests.plugin.any_logs import any_rules, applications, assert_valid, captures, damaged_logs, json_values
from tests.plugin.outcomes import Log, decided, result

pytestmark = pytest.mark.slow


@settings(max_examples=400, deadline=None)
@given(damaged_logs(), applications, any_rules, captures)
def test_a_recording_with_any_field_missing_or_of_any_type_has_a_valid_decision(
    log: Log, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=150, deadline=None)
@given(json_values, applications, any_rules, captures)
def test_any_json_value_has_a_valid_decision(
    log: object, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=300, deadline=None)
@given(damaged_logs(), any_rules)
def test_each_pdk_query_is_made_at_most_once_and_only_if_the_rules_depend_on_it(
    log: Log, rules: Rules
) -> None:
    results, queries = QueryResults(), []
    while isinstance(found := decided(log, results, rules), PdkQuery):
        queries.append(found)
        results = results.with_result(found, None)
    assert len(set(queries)) == len(queries)
    if rules.application_context == "never":
        assert PdkQuery.APPLICATION not in queries
    if not any(attribute.place == "path_capture" for attribute in rules.attributes):
        assert PdkQuery.CAPTURES not in queries
    # The decision does not depend on whether the queries were made.
    assert repr(found) == repr(decided(log, QueryResults(results.completed().application, None), rules))


@settings(max_examples=150, deadline=None)
@given(damaged_logs(), applications, any_rules)
def test_the_decision_is_deterministic_and_does_not_change_the_log(
    log: Log, application: object, rules: Rules
) -> None:
    before = copy.deepcopy((log, application))
    first = result(log, application, rules)
    assert repr((log, application)) == repr(before)
    assert repr(result(log, application, rules)) == repr(first)
