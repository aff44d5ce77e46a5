"""Token counts that Kong's AI plugins write into the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Raw

from openmeter_plugin.metering.lenient_json import count, json_object, parse_log, text


def token_counts(
    raw: Raw,
) -> Iterator[tuple[str, Literal["input", "output"], int, Mapping[str, Any]]]:
    """Yield (ai key, direction, tokens, meta) for each count above 0 in the log's undecoded `ai`.

    Nearly every Kong version moved them (3.6 flat, then one block per plugin, `proxy` in 3.9), and 3.7
    wrote the names in the singular, so a block is recognized by its shape.
    """
    ai = parse_log(bytes(raw))
    names: set[str] = set()
    for key, value in (("ai", ai), *json_object(ai).items()):
        block = json_object(value)
        if "usage" not in block:
            continue
        usage = json_object(block.get("usage"))
        meta = json_object(block.get("meta"))
        name = text(key) or "ai"
        while name in names:  # two events with the same id would count as one
            name += "~"
        names.add(name)
        tokens = count(usage.get("prompt_tokens")) or count(usage.get("prompt_token"))
        if tokens:
            yield name, "input", tokens, meta
        tokens = count(usage.get("completion_tokens")) or count(usage.get("completion_token"))
        if tokens:
            yield name, "output", tokens, meta
