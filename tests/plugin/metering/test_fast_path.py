"""The fast path: the same bytes as `event.decide`, or None."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.instances.record import usage_record
from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.event import decide
from openmeter_plugin.metering.fast_path import fast_path_for
from openmeter_plugin.metering.lenient_json import MAX_TEXT, parse_log
from openmeter_plugin.metering.pdk_queries import NO_RESULTS
from openmeter_plugin.metering.rules import Attribute, Filters, Lookup, Rules
from tests.harness.recordings import WIRE, serialized

NOW = 1_800_000_000_123
FIELDS = ("id", "username", "custom_id", "tag")


def rules(field: str = "id", **settings: Any) -> Rules:
    return Rules(source="kong-test", lookups=(Lookup("consumer", field),), **settings)


def fast_record(raw: bytes, by: Rules) -> bytes | None:
    fast_path = fast_path_for(by)
    assert fast_path is not None
    return fast_path.record(raw)


def slow_record(raw: bytes, by: Rules) -> bytes | None:
    found = decide(parse_log(raw), NO_RESULTS, by, now_ms=NOW, new_id=lambda: "made up")
    return usage_record(found) if isinstance(found, list) else None


RECORDINGS = {
    path.stem: serialized(path.stem.removeprefix("serialize-")).log
    for path in sorted(WIRE.glob("serialize-*"))
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recording_has_the_same_record_or_none(name: str, field: str) -> None:
    raw, by = RECORDINGS[name], rules(field)
    assert fast_record(raw, by) in (None, slow_record(raw, by))


@pytest.mark.parametrize("name", ["serialize-authenticated", "serialize-gzip", "serialize-head"])
def test_an_ordinary_request_takes_the_fast_path(name: str) -> None:
    raw = RECORDINGS[name]
    assert fast_record(raw, rules()) is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"filters": Filters(statuses=frozenset({200}))},
        {"attributes": (Attribute("constant", "x", "y"),)},
        {"application_context": "always"},
        {"meter_api_requests": False},
    ],
)
def test_rules_that_need_more_fields_have_no_fast_path(settings: dict[str, Any]) -> None:
    assert fast_path_for(rules(**settings)) is None


def test_a_subject_that_is_not_from_the_consumer_has_no_fast_path() -> None:
    by = Rules(source="kong-test", lookups=(Lookup("header", "x-customer"), Lookup("consumer", "id")))
    assert fast_path_for(by) is None


def test_a_request_with_metered_tokens_does_not_take_the_fast_path() -> None:
    log = orjson.dumps(serialized("authenticated").parsed | {"ai": {}})
    assert fast_record(log, rules()) is None
    assert fast_record(log, rules(ai=AiRules(token_usage=False, agent_requests=False))) is not None


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, member in value.items():
            found += paths(member, (*path, key))
    return found


LOG = serialized("authenticated").parsed
LOG["consumer"]["tags"] = ["customer:acme", "gold"]
READ = {"started_at", "consumer", "request", "response", "latencies", "route", "service", "source"}
PATHS = [p for p in paths(LOG) if p[0] in READ | {"workspace_name", "authenticated_entity"}]

TEXTS = st.one_of(
    st.text(),
    st.sampled_from(["", "a" * MAX_TEXT, "ä" * (MAX_TEXT + 1), 'quote " \\ \u2028 \x00 \x1f \x7f', "😀"]),
)
NUMBERS = st.one_of(
    st.integers(-5, 10),
    st.sampled_from([2**53, 2**53 + 1, 2**63, 2**64, 10**30, 253_402_300_799_999, 253_402_300_800_000]),
    st.floats(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.sampled_from(["12", "customer:b"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), VALUES | st.just(...)), max_size=4)


def changed(log: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Return the log with the values at some paths replaced, or removed for `...`."""
    log = copy.deepcopy(log)
    for path, value in changes:
        place: Any = log
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value is ...:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
    return log


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_any_value_in_one_place_has_the_same_record_or_none(path: tuple[str, ...], field: str) -> None:
    values: list[Any] = [
        ...,
        None,
        "",
        "12",
        "x" * (MAX_TEXT + 1),
        0,
        -1,
        7.0,
        7.5,
        2**60,
        True,
        [],
        {},
        ["x"],
    ]
    for value in values:
        raw = orjson.dumps(changed(LOG, [(path, value)]))
        assert fast_record(raw, rules(field)) in (None, slow_record(raw, rules(field))), value


@given(changes=CHANGES, field=st.sampled_from(FIELDS), anonymous=st.booleans())
def test_any_log_has_the_same_record_or_none(
    changes: list[tuple[tuple[str, ...], Any]], field: str, anonymous: bool
) -> None:
    by = rules(field, meter_anonymous_consumer=anonymous)
    try:
        raw = orjson.dumps(changed(LOG, changes))
    except TypeError:
        return  # numbers and texts that JSON cannot express
    assert fast_record(raw, by) in (None, slow_record(raw, by))


@given(cut=st.integers(0, 2500), noise=st.binary(max_size=4), at=st.integers(0, 2500))
def test_damaged_bytes_never_raise_and_never_have_another_record(cut: int, noise: bytes, at: int) -> None:
    raw = orjson.dumps(LOG)
    raw = (raw[:at] + noise + raw[at:])[: cut or None]
    assert fast_record(raw, rules()) in (None, slow_record(raw, rules()))


def test_the_last_of_a_repeated_member_counts_on_both_paths() -> None:
    raw = orjson.dumps(LOG)
    repeated = b'{"consumer":{"id":"other","username":"other","custom_id":"other"},' + raw[1:]
    assert fast_record(repeated, rules()) == slow_record(repeated, rules()) is not None
    last = raw[:-1] + b',"consumer":{"id":"other"}}'
    assert fast_record(last, rules()) == slow_record(last, rules()) is not None
