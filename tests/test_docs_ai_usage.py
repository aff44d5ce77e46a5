"""docs/ai-usage.md: each row of the table of tokens is what the plugin does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.metering.ai_events import AiRules, ai_events
from openmeter_plugin.metering.ai_usage import AiUsageGap

PAGE = (Path(__file__).parents[1] / "docs" / "ai-usage.md").read_text()
ROWS = re.findall(
    r"^\| ([^|]+) \| `([^`|]+)` \| (`(?:input|output|cache_|reasoning)[^|]*) \| [^|]+ \|$", PAGE, re.MULTILINE
)
SUMS = {"prompt_tokens": 1000, "completion_tokens": 1000}
"""Large enough to contain any detail."""


def test_the_table_has_its_rows() -> None:
    assert len(ROWS) == 20
    table = PAGE[PAGE.index("| Provider |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(ROWS)
    assert all(len(row.split(" | ")) == 4 and len(row.split(" | ")[3]) > len("|") for row in table)


def test_the_page_names_every_gap_in_the_order_of_their_weight() -> None:
    rows = re.findall(r"^\| `(ai_[a-z_]+)` \|", PAGE, re.MULTILINE)
    assert rows == list(AiUsageGap)


@pytest.mark.parametrize(("providers", "field", "meaning"), ROWS)
def test_each_field_is_read_as_the_page_says(providers: str, field: str, meaning: str) -> None:
    kind = re.match(r"`([a-z_]+)`", meaning)
    assert kind
    modality = re.search(r"modality `([a-z]+)`", meaning)
    for provider in ("openai", "azure", "gemini") if "others" in providers else providers.split(", "):
        log = logged(field, 7, "openai" if provider == "any" else provider)
        events = [data for _, _, data in ai_events(log, AiRules(tokens="split"), "r")]
        assert [
            data["tokens"]
            for data in events
            if (data["type"], data["modality"]) == (kind[1], modality[1] if modality else "text")
        ] == [7], (provider, field)
        if "taken off" in meaning and "before" not in meaning:
            assert sum(data["tokens"] for data in events) == 2000
        elif "if Kong's version is unknown" in meaning:
            assert sum(data["tokens"] for data in events) == 2007


def logged(field: str, tokens: int, provider: str) -> dict[str, Any]:
    """Return a log with one count at a field's path."""
    meta = {"provider_name": provider}
    *tables, name = field.split(".")
    if name == "embeddings_tokens":
        return {"ai": {"proxy": {tables[0]: {name: tokens}, "meta": meta}}}
    inner: Any = {name: tokens}
    for table in reversed(tables):
        inner = {table: inner}
    is_sum = field in {"prompt_token", "completion_token", "input_tokens", "output_tokens"} | set(SUMS)
    usage = inner if is_sum else SUMS | inner
    headers = {"via": "1.1 kong/3.15.0.4"} if provider == "xai" else {}
    return {"ai": {"proxy": {"usage": usage, "meta": meta}}, "response": {"headers": headers}}
