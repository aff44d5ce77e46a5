"""The token counts that Kong's AI plugins leave in the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from openmeter_plugin.metering.lenient_json import count, table, text


def token_counts(
    ai: object,
) -> Iterator[tuple[str, Literal["input", "output"], int, Mapping[str, Any]]]:
    """Yield (ai key, direction, tokens, meta) for each count that is more than 0.

    The place changed with nearly every Kong version (3.6 flat, then one block per plugin, in 3.9
    `proxy`), and 3.7 wrote the names in the singular, so blocks are known by their shape.
    """
    names: set[str] = set()
    for key, value in (("ai", ai), *table(ai).items()):
        block = table(value)
        if "usage" not in block:
            continue
        usage = table(block.get("usage"))
        meta = table(block.get("meta"))
        name = text(key) or "ai"
        while name in names:  # two events of one id would be counted as one
            name += "~"
        names.add(name)
        tokens = count(usage.get("prompt_tokens")) or count(usage.get("prompt_token"))
        if tokens:
            yield name, "input", tokens, meta
        tokens = count(usage.get("completion_tokens")) or count(usage.get("completion_token"))
        if tokens:
            yield name, "output", tokens, meta
