"""Scanner: entries that are too large to be parsed at once are shortened, in bounded steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.http_log import splitter as splitter_module
from openmeter_plugin.http_log.scanner import Limits, Scan
from openmeter_plugin.http_log.splitter import EntrySplitter
from openmeter_plugin.metering import lenient_json
from openmeter_plugin.metering.event import decide
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.pdk_queries import QueryResults
from tests.harness.recordings import llm_request, serialized

pytestmark = pytest.mark.slow

CHUNK = 64 * 1024
LIMITS = Limits()

_LETTERS = st.text(st.sampled_from('ab "\\/\n\x00é€😀{}[],:') | st.characters(codec="utf-8"), min_size=1)
_TEXTS = st.builds(lambda piece, times: piece * times, _LETTERS, st.sampled_from([1, 10, 1500, 20_000]))
_VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def only_entry(log: object, *, escaped: bool = True, limits: Limits = LIMITS) -> Any:
    """Return the parsed value of a log that is the only one of its post."""
    splitter = EntrySplitter(limits)
    body = json.dumps([log], separators=(",", ":"), ensure_ascii=escaped).encode()
    found = [entry for entry in (*splitter.feed(body), *splitter.finish()) if entry]
    ((value, _),) = found
    return value


def is_like(kept: Any, whole: Any) -> bool:
    """Return whether a value is another one with shortened texts and removed containers."""
    if type(whole) is str and type(kept) is str:
        return kept == whole or (len(kept) >= 2 * MAX_TEXT and whole.startswith(kept))
    if type(whole) is list and type(kept) is list:
        return len(kept) == len(whole) and all(map(is_like, kept, whole))
    if type(whole) is dict and type(kept) is dict:
        return list(kept) == list(whole) and all(is_like(kept[key], whole[key]) for key in whole)
    return bool(kept == whole) or (kept is None and isinstance(whole, (list, dict)))


@given(_VALUES, st.booleans(), st.sampled_from([1000, 10_000, LIMITS.parsed]))
def test_a_shortened_log_is_the_log_with_shorter_texts_and_without_some_containers(
    value: object, escaped: bool, parsed: int
) -> None:
    log = {"request": {"id": "r"}, "payload": value}
    kept = only_entry(log, escaped=escaped, limits=Limits(parsed=parsed, text=300, container=500))
    assert kept is None or (is_like(kept, log) and kept["request"] == {"id": "r"})


@given(_TEXTS, _TEXTS, st.booleans())
def test_the_event_of_a_log_with_enormous_texts_is_that_of_the_whole_log(
    header: str, name: str, escaped: bool
) -> None:
    _, rules = parse_config(
        {
            "ingest_endpoint": "http://127.0.0.1:9/",
            "subject": {"look_up_value_in": "header", "field": "x-subject"},
            "attributes": [
                {"source": "header", "look_up_value_in": "x-header", "event_property_name": "h"},
                {"source": "consumer_tag", "look_up_value_in": "team", "event_property_name": "t"},
            ],
        }
    )
    for subject in ("someone", header):
        log = llm_request().parsed
        log["request"]["headers"] |= {"x-header": header, "x-subject": subject}
        log["consumer"] |= {"username": name, "tags": [f"team: {name}"]}
        log["payload"] = "x" * LIMITS.parsed
        of_whole, of_kept = (
            decide(one, QueryResults(None, None), rules, now_ms=0, new_id=lambda: "new")
            for one in (log, only_entry(log, escaped=escaped))
        )
        assert of_kept == of_whole


def test_token_counts_next_to_an_enormous_payload_are_kept() -> None:
    payloads: list[object] = ["x" * 1_000_000, '{"role": "user"}, ' * 50_000, [{"role": "user"}] * 50_000]
    for payload in payloads:
        log = llm_request().parsed
        usage = log["ai"]["proxy"]["usage"]
        log["ai"]["proxy"] = {"payload": {"request": payload}, **log["ai"]["proxy"], "more": {"m": payload}}
        kept = only_entry(log)
        assert kept["ai"]["proxy"]["usage"] == usage
        assert {key: kept[key] for key in kept if key != "ai"} == {
            key: log[key] for key in log if key != "ai"
        }
        assert len(orjson.dumps(kept)) < LIMITS.parsed


def test_a_list_that_is_too_large_even_without_its_inner_list_is_removed_as_a_whole() -> None:
    log = {"request": {"id": "r"}, "payload": [list(range(40_000)), *range(40_000)], "last": 1}
    expected = {"request": {"id": "r"}, "last": 1}
    assert only_entry(log) == expected | {"payload": None}
    log["payload"] = [list(range(40_000)), "beside"]
    assert only_entry(log) == expected | {"payload": [None, "beside"]}


def test_a_large_log_with_a_list_that_is_too_large_keeps_all_of_the_rest() -> None:
    rest = {f"text {number}": "x" * LIMITS.text for number in range(2 * LIMITS.container // LIMITS.text - 8)}
    log = {"request": {"id": "r"}, "payload": list(range(40_000))} | rest
    assert only_entry(log) == log | {"payload": None}


def test_a_log_at_the_limit_is_parsed_unchanged_and_one_beyond_it_is_shortened() -> None:
    log = {"payload": ""}
    log["payload"] = "x" * (LIMITS.parsed - len(orjson.dumps(log)))
    assert only_entry(log) == log
    log["payload"] += "x"
    assert only_entry(log) == {"payload": "x" * (2 * MAX_TEXT)}


def test_a_log_of_nothing_but_thousands_of_members_is_a_bad_record() -> None:
    assert only_entry({f"member {number}": number for number in range(20_000)}) is None


def logs(count: int) -> bytes:
    """Return a body of recorded logs."""
    return b"[" + b",".join([serialized("authenticated").log] * count) + b"]"


def log_with(payload: object, *, alone: bool = False) -> bytes:
    """Return a body of one log with a payload."""
    log = serialized("authenticated").parsed | {"payload": payload}
    return orjson.dumps(log if alone else [log])


BODIES: dict[str, Callable[[], bytes]] = {
    "many logs": lambda: logs(1000),
    "a text": lambda: log_with("x" * 3_000_000),
    "a text with escapes": lambda: log_with('"' * 1_500_000),
    "small values": lambda: log_with([{"n": n} for n in range(200_000)]),
    "nested": lambda: log_with([[[[n]]] for n in range(100_000)]),
    "members": lambda: log_with({str(n): "text" for n in range(100_000)}),
    "texts": lambda: log_with([f"{n} {'x' * 5000}" for n in range(500)]),
    "alone": lambda: log_with("x" * 3_000_000, alone=True),
    "brackets": lambda: b"[" * 1_000_000,
    "digits": lambda: b"[" + b"1" * 3_000_000 + b"]",
    "boundaries": lambda: b'[{"a":[' + b'{"b":1},' * 300_000 + b"1]}]",
    "spaces": lambda: b'[{"a":1}' + b" " * 3_000_000 + b"]",
}


@pytest.mark.parametrize("name", BODIES)
def test_no_step_parses_or_scans_more_than_its_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    passed: list[int] = []
    scan_step = Scan.step

    def loads(raw: bytes) -> Any:
        parsed.append(len(raw))
        return orjson.loads(raw)

    def step(scan: Scan, buffer: bytearray) -> object:
        before = scan._at
        result = scan_step(scan, buffer)
        passed.append(scan._at - before)
        return result

    recording = SimpleNamespace(loads=loads, JSONDecodeError=orjson.JSONDecodeError)
    monkeypatch.setattr(splitter_module, "orjson", recording)
    monkeypatch.setattr(lenient_json, "orjson", recording)
    monkeypatch.setattr(Scan, "step", step)
    splitter, body, between = EntrySplitter(), BODIES[name](), [0]
    for start in range(0, len(body), CHUNK):
        between.extend(len(parsed) + len(passed) for _ in splitter.feed(body[start : start + CHUNK]))
    monkeypatch.undo()
    assert max(parsed, default=0) <= LIMITS.parsed
    assert max(passed, default=0) <= 2 * CHUNK
    # Between two pauses for other tasks: the end of a chunk, one step, and one parse.
    assert max(late - early for early, late in pairwise(between)) <= 3
    assert len(passed) + len(parsed) >= len(body) / (2 * LIMITS.parsed) or name == "spaces"


def test_a_step_handles_a_bounded_number_of_brackets() -> None:
    splitter = EntrySplitter()
    assert len(list(splitter.feed(b"[" * 1_000_000))) >= 5000
