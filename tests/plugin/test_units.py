"""Parsing of durations and sizes."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest

from openmeter_plugin.units import duration, number, plural, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("1.5h", timedelta(minutes=90)),
        (" 0s ", timedelta(0)),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, expected: timedelta) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "7", "d", "7 d", "-7d", "7w", "7D", "1e3s", ".5h", "7d12h"])
def test_an_invalid_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as 90s, 12h or 7d"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("500", 500),
        ("64KiB", 65_536),
        ("500MiB", 524_288_000),
        ("1 GiB", 1_073_741_824),
        (" 2TiB ", 2_199_023_255_552),
    ],
)
def test_a_size_is_in_bytes_or_binary_units(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "1.5GiB", "-1", "500MB", "1mib", "1 G"])
def test_an_invalid_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 500MiB or 1GiB"):
        size(text)


def test_counts_have_separators_and_agree_with_their_noun_and_verb() -> None:
    assert number(1234567) == "1,234,567"
    assert number(2.0) == "2"
    assert number(0.125) == "0.12"
    assert plural(0, "change") == "0 changes"
    assert plural(1, "change") == "1 change"
    assert plural(1200, "change") == "1,200 changes"
    assert plural(1, "event waits", "events wait") == "1 event waits"
    assert plural(2, "event waits", "events wait") == "2 events wait"


FIXED_PLURAL = re.compile(
    r"(?<![{(])\{(?!_MAX|tries|[a-z_.]*(?:type|status)\}|name\}|REQUESTS\})[^{}]*\}"
    r" (?:events|requests|subjects|customers|consumers|changes|principals|segments|records|lines|files|spans"
    r"|hours|applications|dead letters|problems|warnings|differences|ledger lines|bytes of)\b"
)


@pytest.mark.parametrize("package", ["plugin/openmeter_plugin", "syncd"])
def test_no_text_says_1_events(package: str) -> None:
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}: {match[0]}"
        for path in sorted((root / package).rglob("*.py"))
        for match in FIXED_PLURAL.finditer(path.read_text())
    ]
    assert not found, "openmeter_plugin.units.plural makes a noun agree with its count"
