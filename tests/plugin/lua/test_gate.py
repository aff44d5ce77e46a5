"""The gate's decisions in Kong, in both shells: the plugin `openmeter-gate` and post-function."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plugin.lua.gate_node import Node, Shell
from tests.plugin.lua.scripted_gate import STATUSES, ScriptedGate, line, settings

PASS = 200


def fed(gate: ScriptedGate, shell: Shell = "plugin", **options: Any) -> Node:
    """Return a node that has what the gate sends. post-function starts with the first request of a worker."""
    node = Node(gate, shell=shell, **options)
    for worker in range(len(node.workers)):
        node.request("nobody-in-particular", worker=worker)
    node.run(1.5)
    return node


def statuses(node: Node, consumer: str, n: int) -> list[int]:
    return [node.request(consumer, worker=i % len(node.workers)).status for i in range(n)]


# Who passes


def test_exactly_as_many_requests_pass_as_are_left(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 5)
    node = fed(gate, shell)
    assert statuses(node, "alice", 8) == [PASS] * 5 + [429] * 3


@pytest.mark.parametrize(("reason", "status"), STATUSES.items())
def test_a_denied_subject_gets_the_answer_of_the_reason(
    gate: ScriptedGate, shell: Shell, reason: str, status: int
) -> None:
    gate.deny("alice", reason)
    answer = fed(gate, shell).request("alice")
    assert (answer.status, answer.reason, answer.message, answer.mark) == (
        status,
        reason,
        f"No: {reason}",
        reason,
    )


def test_no_limit_is_not_counted(gate: ScriptedGate) -> None:
    gate.allow("alice", "-")
    node = fed(gate)
    assert statuses(node, "alice", 20) == [PASS] * 20
    node.run(1)
    assert gate.counters == {}


def test_subjects_of_one_account_share_what_is_left(gate: ScriptedGate) -> None:
    gate.account("alice", "acme")
    gate.account("bob", "acme")
    gate.send(line("A", "acme", "requests", 3, 0, 0, "-"))
    node = fed(gate)
    assert [node.request(who).status for who in ("alice", "bob", "alice", "bob", "alice")] == [PASS] * 3 + [
        429
    ] * 2


@pytest.mark.parametrize(("unseen", "status"), [("allow", PASS), ("deny", 403)])
def test_a_subject_that_the_gate_has_not_decided_about_follows_the_setting_and_is_reported(
    gate: ScriptedGate, shell: Shell, unseen: str, status: int
) -> None:
    gate.settings = settings(unseen=unseen)
    node = fed(gate, shell)
    assert node.request("new").status == status
    node.run(1)
    assert gate.seen["new"] == 1
    assert gate.uncounted == ({("new", "requests"): 1} if unseen == "allow" else {})


def test_requests_that_pass_without_a_ceiling_are_reported_once_each(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.settings = settings(features="requests,tokens")
    gate.allow("alice", 5, feature="tokens")
    gate.account("bob", "bob")
    node = fed(gate, shell)
    statuses(node, "alice", 3)
    statuses(node, "bob", 2)
    gate.refused_reports = 2
    node.run(5)
    statuses(node, "alice", 1)
    node.run(1)
    assert gate.uncounted == {("alice", "requests"): 4, ("bob", "requests"): 2, ("bob", "tokens"): 2}


@pytest.mark.parametrize(("no_subject", "status"), [("allow", PASS), ("deny", 403)])
def test_a_request_without_a_subject_follows_the_setting(
    gate: ScriptedGate, no_subject: str, status: int
) -> None:
    gate.settings = settings(no_subject=no_subject)
    assert fed(gate).request(None).status == status


def test_nothing_is_stopped_in_shadow_and_what_would_be_is_reported(gate: ScriptedGate, shell: Shell) -> None:
    gate.settings = settings(mode="shadow")
    gate.allow("alice", 2)
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell)
    answers = [node.request("alice") for _ in range(5)] + [node.request("bob")]
    assert {(answer.status, answer.mark, *answer.headers) for answer in answers} == {(PASS, None)}
    node.run(1)
    assert gate.counters["alice", "requests"] == 5
    assert gate.stops == {
        ("alice", "requests", "USAGE_LIMIT_REACHED", "shadow"): 3,
        ("bob", "requests", "FEATURE_UNAVAILABLE", "shadow"): 1,
    }


def test_off_does_nothing_at_all(gate: ScriptedGate) -> None:
    gate.settings = settings(mode="off")
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    assert node.request("alice").passed
    node.run(1)
    assert gate.stops == {}
    assert gate.seen == {}


@pytest.mark.parametrize("of_gate", ["off", "shadow", "enforce"])
@pytest.mark.parametrize("of_instance", ["off", "shadow", "enforce"])
def test_the_weaker_mode_of_the_gate_and_of_the_instance_applies(
    gate: ScriptedGate, shell: Shell, of_gate: str, of_instance: str
) -> None:
    gate.settings = settings(mode=of_gate)
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell, mode=of_instance)
    assert node.request("alice").passed is not (of_gate == of_instance == "enforce")


# Several features


@pytest.mark.parametrize("order", ["requests,tokens", "tokens,requests"])
def test_all_features_must_have_access_and_a_refused_request_takes_from_none(
    gate: ScriptedGate, shell: Shell, order: str
) -> None:
    gate.settings = settings(features=order)
    gate.allow("alice", 10)
    gate.allow("alice", 2, feature="tokens")
    node = fed(gate, shell)
    assert statuses(node, "alice", 4) == [PASS, PASS, 429, 429]
    gate.allow("alice", 8, 2, feature="tokens")
    node.run(1)
    assert statuses(node, "alice", 10) == [PASS] * 8 + [429] * 2


def test_the_features_of_an_instance_replace_the_rules(gate: ScriptedGate, shell: Shell) -> None:
    gate.settings = settings(features="requests,tokens")
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    gate.allow("alice", "-", feature="tokens")
    assert fed(gate, shell, features=["tokens"]).request("alice").passed


ENTITIES: dict[str, Any] = {
    "route": {"id": "r-id", "name": "r", "tags": ["r-tag"]},
    "service": {"id": "s-id", "name": "s", "tags": ["s-tag"]},
    "authenticated_consumer": {"id": "c-id", "username": "alice", "custom_id": "c-cid", "tags": ["c-tag"]},
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("all", ["*"]),
        ("route", ["r", "r-id"]),
        ("service", ["s", "s-id"]),
        ("consumer", ["alice", "c-cid", "c-id"]),
        ("tag", ["r-tag", "s-tag", "c-tag"]),
    ],
)
def test_rules_say_which_requests_need_a_feature(gate: ScriptedGate, kind: str, values: list[str]) -> None:
    for value in values:
        one = ScriptedGate()
        one.settings = [each for each in settings() if each[0] != "R"] + [line("R", kind, value, "requests")]
        one.deny("alice", "FEATURE_UNAVAILABLE")
        one.deny("bob", "FEATURE_UNAVAILABLE")
        node = fed(one)
        assert node.request(**ENTITIES).status == 403
        other: dict[str, Any] = {name: {"id": "other", "username": "bob"} for name in ENTITIES}
        assert node.request(**other).passed is (kind != "all")


# The subject, as the plugin finds it in the log


@pytest.mark.parametrize(
    ("place", "field", "request_", "subject"),
    [
        ("consumer", "id", {}, "consumer:id-of-alice"),
        ("consumer", "username", {}, "alice"),
        ("consumer", "custom_id", {"authenticated_consumer": {"id": "1", "custom_id": "cu"}}, "cu"),
        (
            "consumer",
            "tag",
            {"authenticated_consumer": {"id": "1", "tags": ["x", "customer: acme "]}},
            "acme",
        ),
        ("application", "id", {"shared": {"kaa_application_context": {"application_id": "7"}}}, "app:7"),
        ("application", "developer_id", {"shared": {"kaa_application_context": {"developer_id": "d"}}}, "d"),
        ("header", "x-customer", {"headers": {"X-Customer": "acme"}}, "acme"),
        ("query", "customer", {"query": {"customer": "acme"}}, "acme"),
    ],
)
def test_the_subject_is_found_where_the_lookup_says(
    gate: ScriptedGate, place: str, field: str, request_: dict[str, Any], subject: str
) -> None:
    gate.settings = [each for each in settings(unseen="deny", no_subject="deny") if each[0] != "L"]
    gate.settings.append(line("L", 1, place, field))
    gate.allow(subject, "-")
    node = fed(gate)
    assert node.request(**request_).passed
    assert not node.request(authenticated_consumer={"id": "1", "username": "other"}).passed


ANONYMOUS: dict[str, Any] = {"headers": {"x-anonymous-consumer": "true"}, "authenticated_credential": None}


def test_an_anonymous_consumer_is_no_subject_unless_the_setting_says_so(gate: ScriptedGate) -> None:
    gate.settings = settings(no_subject="deny")
    node = fed(gate)
    assert not node.request(**ANONYMOUS).passed
    assert node.request(headers=ANONYMOUS["headers"]).passed  # a client can send the header itself
    gate.configure(settings("2", no_subject="deny", anonymous="on"))
    node.run(1)
    assert node.request(**ANONYMOUS).passed


def test_a_header_is_a_subject_only_of_an_authenticated_request_unless_the_setting_says_so(
    gate: ScriptedGate,
) -> None:
    lookup = line("L", 1, "header", "x-customer")
    gate.settings = [each for each in settings(no_subject="deny") if each[0] != "L"] + [lookup]
    node = fed(gate)
    headers = {"x-customer": "acme"}
    assert not node.request(None, headers=headers).passed
    assert node.request(headers=headers).passed
    changed = settings("2", no_subject="deny", require_consumer="off")
    gate.configure([each for each in changed if each[0] != "L"] + [lookup])
    node.run(1)
    assert node.request(None, headers=headers).passed


def test_two_customer_tags_make_no_subject(gate: ScriptedGate) -> None:
    gate.settings = [each for each in settings(no_subject="deny") if each[0] != "L"]
    gate.settings.append(line("L", 1, "consumer", "tag"))
    consumer = {"id": "1", "tags": ["customer:a", "customer:b"]}
    assert not fed(gate).request(authenticated_consumer=consumer).passed


def test_special_characters_in_a_subject_are_one_subject_in_both_directions(gate: ScriptedGate) -> None:
    odd = "a\tb%c\nd"
    gate.send(line("K", "a%09b%25c%0Ad", "acc%09ount"))
    gate.send(line("A", "acc%09ount", "requests", 1, 0, 0, "-"))
    node = fed(gate)
    consumer = {"id": "1", "username": odd}
    assert [node.request(authenticated_consumer=consumer).status for _ in range(2)] == [PASS, 429]
    node.run(1)
    assert gate.counters == {("acc%09ount", "requests"): 1}
    assert gate.stops == {("a%09b%25c%0Ad", "requests", "USAGE_LIMIT_REACHED", "enforce"): 1}


# Headers


def test_headers_say_what_is_left_and_when_it_is_reset(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 2, reset=1_800_000_100, quota=50)
    node = fed(gate, shell)
    node.now = 1_800_000_040.0
    answers = [node.request("alice") for _ in range(3)]
    policy = {"RateLimit-Policy": '"requests";q=50'}
    assert [answer.headers for answer in answers] == [
        {"RateLimit": '"requests";r=1;t=60'} | policy,
        {"RateLimit": '"requests";r=0;t=60'} | policy,
        {"RateLimit": '"requests";r=0;t=60', "Retry-After": "60"} | policy,
    ]


def test_headers_count_down_the_seconds_to_a_reset_and_stop_naming_them_after_it(gate: ScriptedGate) -> None:
    gate.settings = settings(max_stale="600")
    gate.allow("alice", 10**15, reset=1_800_000_100, quota=10**15)
    node = fed(gate)
    shown = []
    for now in (40.25, 40.75, 41.0, 39.0, 99.5, 100.0, 101.0):
        node.now = 1_800_000_000 + now
        shown.append(node.request("alice").headers["RateLimit"].partition(";r=99999999999999")[2])
    assert shown == [";t=59", ";t=59", ";t=59", ";t=61", ";t=0", "", ""]
    assert node.request("alice").headers["RateLimit-Policy"] == '"requests";q=99999999999999'


def test_headers_name_each_feature_with_a_limit(gate: ScriptedGate) -> None:
    gate.settings = settings(features="requests,tokens,other")
    gate.allow("alice", 2)
    gate.allow("alice", 7, feature="tokens", quota=9)
    gate.allow("alice", feature="other")
    expected = {"RateLimit": '"requests";r=1, "tokens";r=6', "RateLimit-Policy": '"tokens";q=9'}
    assert fed(gate).request("alice").headers == expected


def test_headers_can_be_off(gate: ScriptedGate) -> None:
    gate.settings = settings(headers="off")
    gate.allow("alice", 1, reset=1_800_000_100)
    node = fed(gate)
    assert node.request("alice").headers == {}
    assert list(node.request("alice").headers) == ["Retry-After"]


# Nothing of it reaches a request


def test_before_the_gate_was_ever_reached_everything_passes(gate: ScriptedGate, shell: Shell) -> None:
    gate.state = "dead"
    node = Node(gate, shell=shell)
    node.request()
    node.run(10)
    answer = node.request()
    assert (answer.passed, answer.mark) == (True, None)


def test_a_missing_dict_lets_everything_pass_and_is_named(gate: ScriptedGate, shell: Shell) -> None:
    node = Node(gate, shell=shell, entries=None)
    assert node.request().passed
    assert any("nginx_http_lua_shared_dict = openmeter_gate 10m" in text for text in node.said)


def test_an_answer_that_kong_cannot_give_lets_the_request_pass_and_bills_it(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell)
    node.workers[0][b"exit_fails"] = True
    answer = node.request("alice")
    assert (answer.passed, answer.mark) == (True, None)
    assert any("cannot exit" in text for text in node.said)


@pytest.mark.parametrize(
    "ctx",
    [
        {"route": {"id": 7, "tags": 5}, "service": {"id": {}}},
        {"authenticated_consumer": {"id": True, "username": {}}},
        {"route": None, "service": None, "shared": {"kaa_application_context": "text"}},
    ],
)
def test_a_request_that_is_not_as_expected_passes(gate: ScriptedGate, ctx: dict[str, Any]) -> None:
    places = [("consumer", "id"), ("application", "id"), ("header", "x"), ("query", "x")]
    lookups = [line("L", n, *place) for n, place in enumerate(places, 1)]
    gate.settings = (
        [each for each in settings() if each[0] not in "LR"] + lookups + [line("R", "tag", "t", "requests")]
    )
    node = fed(gate)
    assert node.request(**ctx, query={"x": True}).passed


def test_settings_that_make_no_sense_stop_nobody(gate: ScriptedGate) -> None:
    odd = ["L\t1", "F\trequests\tnan", "R\tall", "W\tSTALE\t99999\tx", "C\tmode", "C", "Z\t1\t2"]
    gate.settings = settings()[:1] + odd
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    assert fed(gate).request("alice").passed
