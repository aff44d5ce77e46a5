"""Whatever Kong may send has a valid outcome, the same each time."""

from __future__ import annotations

import copy

from hypothesis import given, settings

from openmeter_plugin.metering.event import decide
from openmeter_plugin.metering.pdk_queries import PdkQuery, QueryResults
from openmeter_plugin.metering.rules import Rules
from tests.plugin.any_logs import any_rules, applications, assert_valid, captures, damaged_logs, json_values
from tests.plugin.outcomes import NOW, Log, ids, result


@settings(max_examples=400, deadline=None)
@given(damaged_logs(), applications, any_rules, captures)
def test_a_recording_with_any_field_gone_or_of_any_type_has_a_valid_outcome(
    log: Log, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=150, deadline=None)
@given(json_values, applications, any_rules, captures)
def test_any_json_value_has_a_valid_outcome(
    log: object, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=300, deadline=None)
@given(damaged_logs(), any_rules)
def test_kong_is_asked_each_question_once_at_most_and_only_where_the_rules_depend_on_it(
    log: Log, rules: Rules
) -> None:
    answers, asked = QueryResults(), []
    while isinstance(found := decide(log, answers, rules, now_ms=NOW, new_id=ids()), PdkQuery):
        asked.append(found)
        answers = answers.with_result(found, None)
    assert len(set(asked)) == len(asked)
    if rules.application_context == "never":
        assert PdkQuery.APPLICATION not in asked
    if not any(attribute.place == "path_capture" for attribute in rules.attributes):
        assert PdkQuery.CAPTURES not in asked
    # Whether Kong is asked or not: what it would have answered has the same outcome.
    assert repr(found) == repr(result(log, answers.completed().application, rules))


@settings(max_examples=150, deadline=None)
@given(damaged_logs(), applications, any_rules)
def test_the_outcome_is_the_same_each_time_and_the_log_is_left_alone(
    log: Log, application: object, rules: Rules
) -> None:
    before = copy.deepcopy((log, application))
    first = result(log, application, rules)
    assert repr((log, application)) == repr(before)
    assert repr(result(log, application, rules)) == repr(first)
