"""Any configuration that Kong's schema accepts, with any log: one decision and no exception."""

from __future__ import annotations

import json
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from openmeter_plugin.config.instance_config import ConfigError, parse_config
from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.instances import record as outcomes
from openmeter_plugin.instances.instance import Instance
from openmeter_plugin.instances.record import spool_record, usage_record
from openmeter_plugin.log import RateLimit
from openmeter_plugin.metering.event import Quarantined, encode_event
from openmeter_plugin.metering.kong_log import NO_RESULTS, PdkQuery, QueryResults
from openmeter_plugin.metering.rules import Attribute, Rules, SkipReason
from openmeter_plugin.spool.queue import Rotation, SpoolQueue
from openmeter_plugin.spool.segment import EVENTS, QUARANTINED, SKIPPED, Record, encode_record
from tests.harness.recordings import llm_request, serialized
from tests.plugin.any_logs import assert_valid, damaged_logs, json_values
from tests.plugin.outcomes import CONTEXT, decided, result
from tests.plugin.spools import scan

pytestmark = pytest.mark.slow

# Names that are in the recordings, and some that are not.
WORDS = (
    "id",
    "username",
    "custom_id",
    "tag",
    "portal_id",
    "host",
    "user-agent",
    "a",
    "b",
    "echo",
    "city",
    "none",
)
STATUSES = ("200", "404", "200-299", "400-599")
ENDPOINT = {"ingest_endpoint": "http://h/e"}


def values_of(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that Kong accepts for a field of the schema."""
    kind = field["type"]
    if "one_of" in field:
        return st.sampled_from(field["one_of"])
    if kind == "record":
        return record_of(field["fields"])
    if kind == "array":
        return st.lists(values_of(field["elements"]), min_size=field.get("len_min", 0), max_size=3)
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        low, high = field.get("between", (1, 1000))
        return st.integers(max(1, int(low)), high)
    return st.sampled_from(STATUSES if "match_any" in field else WORDS)


def record_of(fields: list[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    described = {name: description for field in fields for name, description in field.items()}
    required = {name: values_of(d) for name, d in described.items() if d.get("required")}
    optional = {name: values_of(d) for name, d in described.items() if not d.get("required")}
    return st.fixed_dictionaries(required, optional=optional)


configurations = record_of([field for field in FIELDS if not {"ingest_endpoint", "api_token"} & set(field)])


@st.composite
def valid_rules(draw: st.DrawFn) -> Rules:
    try:
        _, rules = parse_config(draw(configurations) | ENDPOINT)
    except ConfigError:
        assume(False)  # a lookup without a name, or a reserved property
        raise
    return rules


query_result = st.sampled_from([None, CONTEXT, {"named": {"city": "oslo"}}]) | json_values

quick = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@quick
@given(configurations)
def test_a_configuration_is_accepted_or_refused_with_a_named_field(config: dict[str, Any]) -> None:
    try:
        parse_config(config | ENDPOINT)
    except ConfigError as error:
        assert all(part.split(":")[0].split(".")[0] in config for part in str(error).split("; "))  # noqa: PT017


@quick
@given(damaged_logs() | json_values, valid_rules(), st.data())
def test_a_log_has_one_decision_after_each_query_was_made_once(
    log: object, rules: Rules, data: st.DataObject
) -> None:
    results, queries = NO_RESULTS, []
    while isinstance(found := result(log, results.application, rules, results.captures), PdkQuery):
        queries.append(found)
        results = results.with_result(found, data.draw(query_result))
    assert len(set(queries)) == len(queries)
    assert type(found) in (list, SkipReason, Quarantined)
    assert_valid(found)
    json.dumps(found if isinstance(found, list) else str(found), allow_nan=False)


# The spool record


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test on an internal error, which production counts as a bad record."""

    def fail() -> bool:
        raise AssertionError("an exception was caught")

    monkeypatch.setattr(outcomes._unexpected_limit, "passes", fail)


@settings(
    quick,
    suppress_health_check=[
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
)
@given(damaged_logs() | json_values, valid_rules() | st.none(), st.data())
def test_the_spool_gets_one_kind_of_record_in_its_queue(
    tmp_path_factory: pytest.TempPathFactory,
    strict: None,
    log: object,
    rules: Rules | None,
    data: st.DataObject,
) -> None:
    spool = tmp_path_factory.getbasetemp()
    rotation = Rotation(1, 1, SimpleQueue(), sync_first=False)
    queue, quarantine = SpoolQueue(spool, "q", rotation), SpoolQueue(spool, "quarantine", rotation)
    instance = Instance(1, queue, rules, "no configuration", quarantine)
    results = NO_RESULTS
    while isinstance(spooled := spool_record(instance, json.dumps(log).encode(), results), PdkQuery):
        results = results.with_result(spooled, data.draw(query_result))
    where, raw = spooled
    (record,) = scan(raw, 0, final=True)
    assert isinstance(record, Record)
    assert record.kind in (EVENTS, SKIPPED, QUARANTINED)
    assert where is (quarantine if record.kind == QUARANTINED else queue)


@pytest.mark.parametrize(
    "log", [serialized("authenticated").parsed, llm_request().parsed], ids=["one", "llm"]
)
def test_the_default_configuration_needs_no_pdk_query_for_a_consumer(log: object) -> None:
    _, rules = parse_config(ENDPOINT)
    assert isinstance(decided(log, QueryResults(), rules), list)


def test_an_internal_error_costs_one_request_which_is_counted_as_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("internal error")

    monkeypatch.setattr(outcomes, "decide", fail)
    monkeypatch.setattr(outcomes, "_unexpected_limit", RateLimit())
    queue = SpoolQueue(tmp_path, "q", Rotation(1, 1, SimpleQueue(), sync_first=False))
    spooled = spool_record(Instance(1, queue, Rules(source="kong")), serialized("authenticated").log)
    assert spooled == (queue, encode_record(SKIPPED + b"bad_record"))
    assert [line["event"] for line in lines] == ["record_unreadable"]


@pytest.mark.parametrize(("blocks", "records"), [(127, [255]), (128, [255, 2]), (400, [255, 255, 255, 36])])
def test_a_request_with_more_events_than_fit_into_a_record_has_several_records(
    blocks: int, records: list[int]
) -> None:
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    log = llm_request().parsed | {"ai": {f"block-{n}": usage for n in range(blocks)}}
    found = decided(log, QueryResults(None), Rules(source="kong"))
    assert isinstance(found, list)
    written = [item for item in scan(usage_record(found), 0, final=True) if isinstance(item, Record)]
    assert [record.event_count for record in written] == records
    stored = [event for record in written for event in orjson.loads(b"[" + record.events + b"]")]
    assert stored == [orjson.loads(encode_event(event)) for event in found]


def test_a_quarantined_request_keeps_the_name_of_its_queue(tmp_path: Path) -> None:
    rotation = Rotation(1, 1, SimpleQueue(), sync_first=False)
    queue, quarantine = SpoolQueue(tmp_path, "its-own", rotation), SpoolQueue(tmp_path, "q", rotation)
    attributes = (Attribute("constant", "eu", "region"),)
    rules = Rules(source="kong", lookups=(), missing="quarantine", attributes=attributes)
    quarantined = []
    for instance in (Instance(1, queue, rules, None, quarantine), Instance(2, quarantine, None, "invalid")):
        spooled = spool_record(instance, serialized("authenticated").log, QueryResults(None))
        assert not isinstance(spooled, PdkQuery)
        (record,) = scan(spooled[1], 0, final=True)
        assert isinstance(record, Record)
        quarantined.append(orjson.loads(record.body))
    assert (quarantined[0]["reason"], quarantined[0]["destination"]) == ("no_consumer", "its-own")
    assert quarantined[0]["attributes"] == {"region": "eu"}
    assert quarantined[1]["reason"] == "invalid"
    assert "destination" not in quarantined[1]
