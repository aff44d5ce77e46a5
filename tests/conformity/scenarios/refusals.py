"""What the server refuses concerns one customer, is named with its reason, and the rest goes on."""

from __future__ import annotations

from syncd.core.errors import RefusedError
from syncd.metering.base import Meter
from tests.conformity.stage import APPLIED, BLOCKED, ERROR, Stage, expect


def a_poisoned_consumer_is_named_and_the_rest_goes_on(stage: Stage) -> None:
    before, poisoned, after = stage.users("first", "b\0d", "last")
    result = stage.syncd("apply", "--yes", ends_with=(APPLIED, BLOCKED))
    expect(set(stage.customers()) == {before, after}, f"there are {sorted(stage.customers())}")
    shown = poisoned.replace("\0", "")
    expect(
        stage.named("b") in result.stdout + result.stderr, f"{shown} is not named: {result.stdout[-300:]!r}"
    )
    again = stage.syncd("apply", "--yes", ends_with=(APPLIED, BLOCKED))
    expect("nothing to do" in again.stdout or "blocked" in again.stdout, again.stdout[-300:])


def keys_and_subjects_of_others_are_left_to_them(stage: Stage) -> None:
    by_key, by_subject, free = stage.users("key", "subject", "free")
    hers = [stage.by_hand(by_key, stage.named("hers")), stage.by_hand(stage.named("finance"), by_subject)]
    stage.syncd("apply", "--yes", ends_with=(APPLIED, BLOCKED))
    there = stage.customers()
    expect(free in there, f"the free one was not created: {sorted(there)}")
    for before in hers:
        after = there.get(before["key"], {})
        changed = {name for name in before if name != "updatedAt" and after.get(name) != before[name]}
        expect(not changed, f"{before['key']} of others was changed: {sorted(changed)}")
    with stage.client() as api:
        for key, subject in ((free, stage.named("new")), (stage.named("new"), free)):
            try:
                api.create_customer(key, "name", [subject], {})
            except RefusedError as error:
                expect(error.status == 409, f"a key or subject in use is refused with {error}")
            else:
                expect(False, f"key {key} with subject {subject} was accepted, although one is in use")


def names_with_single_letters_can_be_owners_and_labels(stage: Stage) -> None:
    user, group = stage.named("user"), stage.named("team-a-1")
    consumer = {"username": user, "custom_id": "cid-d-0", "tags": [f"customer:{group}"]}
    stage.consumers(consumer)
    mapping = {
        "group_by": "tag",
        "subject_field": "username",
        "create": {"metadata": {"externalId": "{custom_id}"}},
    }
    stage.configure(owner_id=f"{stage.name}-a-1", mapping=mapping)
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    expect(set(stage.customers()) == {group}, f"there are {sorted(stage.customers())}")
    plan = stage.plan()
    expect(
        plan["in_sync"] and not plan["changes"], f"it is not recognised as managed: {plan['changes']!r:.300}"
    )


def an_unknown_currency_is_left_out(stage: Stage) -> None:
    [username] = stage.users("currency")
    mapping = {"subject_field": "username", "key": "{username}", "create": {"currency": "ZZZ"}}
    stage.configure(mapping=mapping)
    result = stage.syncd("apply", "--yes", ends_with=APPLIED)
    expect("ZZZ" in result.stdout, "the plan does not say that ZZZ is left out")
    expect(stage.customers()[username].get("currency") is None, "ZZZ was stored")


def a_refusal_says_its_reason_in_one_line(stage: Stage) -> None:
    meter = Meter(stage.named("m").replace("-", "_"), "x", "x", "count", stage.name, None, {"1 bad": "$.x"})
    with stage.client() as api:
        try:
            api.create_meter(meter)
        except RefusedError as error:
            said = str(error)
            expect(error.status == 400, said)
            expect("\n" not in said and len(said) < 500, f"{len(said)} characters: {said[:200]!r}")
            words = set(said.lower().replace("'", " ").replace('"', " ").split())
            expect(words & {"dimension", "dimensions", "groupby", "bad", "1"}, f"no reason: {said}")
        else:
            stage.server.meters.append(meter.key)
            expect(False, "a dimension called '1 bad' was accepted")


def a_wrong_url_is_questioned(stage: Stage) -> None:
    stage.users("nobody")
    stage.configure(metering={"url": f"{stage.server.metering_url(stage.dialect)}/somewhere"})
    result = stage.syncd("plan", ends_with=ERROR)
    expect("metering.url" in result.stderr, f"it says {result.stderr[-300:]!r}")


def permissions_are_tried_without_a_trace(stage: Stage) -> None:
    stage.users("nobody")
    before = len(stage.server.customers())
    result = stage.syncd("doctor")
    found = [line for line in result.stdout.splitlines() if "permissions" in line]
    expect(found and all("ok" in line for line in found), f"doctor says {found or result.stdout[-300:]}")
    expect(len(stage.server.customers()) == before, "doctor created a customer")


SCENARIOS = (
    a_poisoned_consumer_is_named_and_the_rest_goes_on,
    keys_and_subjects_of_others_are_left_to_them,
    names_with_single_letters_can_be_owners_and_labels,
    an_unknown_currency_is_left_out,
    a_refusal_says_its_reason_in_one_line,
    a_wrong_url_is_questioned,
    permissions_are_tried_without_a_trace,
)
