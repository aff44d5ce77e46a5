"""Checks of Kong's AI plugins: what they do not log, and token counts that their version gets wrong.

The faults are those of the changelog of Kong Gateway (developer.konghq.com/gateway/changelog); the one of
3.9 was measured on a real Kong 3.9.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from openmeter_plugin.metering.ai_usage import Version, is_fixed
from syncd.doctor.checks import Finding, Level, Plugin

CHECK: Final = "ai usage"

_PLUGINS: Final = frozenset(
    {"ai-proxy", "ai-proxy-advanced", "ai-request-transformer", "ai-response-transformer"}
)


@dataclass(frozen=True, slots=True)
class Miscount:
    """Calls whose tokens Kong counts wrongly, and the first fixed version of each series."""

    providers: frozenset[str]
    what: str
    fixes: tuple[Version, ...]


_AUGUST_2026: Final[tuple[Version, ...]] = ((3, 14, 0, 13), (3, 15, 0, 4))


def _of(providers: str, what: str, *fixes: Version) -> Miscount:
    return Miscount(frozenset(providers.split()), what, fixes)


MISCOUNTS: Final = (
    _of(
        "openai azure huggingface mistral llama2",
        "streamed calls may be logged with an estimated input and no output tokens",
        *((3, 10, 0, 7), (3, 11, 0, 7), (3, 12, 0, 1), (3, 13, 0, 0)),
    ),
    _of("openai azure", "streamed calls of the Responses API are logged with 0 tokens", (3, 14, 0, 0)),
    _of("huggingface", "the provider's own token counts are not used", (3, 14, 0, 3), (3, 15, 0, 0)),
    _of(
        "anthropic bedrock",
        "cached tokens are left out of the input (the plugin adds those that Kong logs)",
        *((3, 14, 0, 8), (3, 15, 0, 4)),
    ),
    # On a real Kong 3.9.1 in OpenAI's format, too: 42 tokens where the provider used 41.
    _of("anthropic", "streamed calls count the provisional output tokens of their start", *_AUGUST_2026),
    _of("anthropic", "requests with compaction are counted too low", *_AUGUST_2026),
    _of("bedrock", "calls in Bedrock's format to models such as Nova have 0 output tokens", *_AUGUST_2026),
    _of("gemini", "streamed calls count their tokens once per chunk", *_AUGUST_2026),
    _of("gemini", "reasoning and tool-use tokens are left out", *_AUGUST_2026),
    _of("gemini", "streamed calls of other vendors' models on Vertex AI are counted too high", (3, 14, 0, 0)),
    _of("openai azure", "audio transcriptions have no tokens", *_AUGUST_2026),
    _of(
        "xai",
        "reasoning tokens are left out of the output (the plugin adds those that Kong logs)",
        (3, 16, 0, 1),
    ),
)


def check_ai(plugins: Iterable[Plugin], version: Version | None) -> Iterator[Finding]:
    """Check the AI plugins of one Kong; `version` is None if unknown."""
    for plugin in plugins:
        if plugin.name in _PLUGINS and plugin.enabled and plugin.unread is None:
            yield from _statistics(plugin)
            yield from _miscounts(plugin, version)


def _statistics(plugin: Plugin) -> Iterator[Finding]:
    silent = sum(logging.get("log_statistics") is not True for logging, _ in _models(plugin.config))
    if silent:
        text = (
            f"{plugin.name} ({plugin.place}): logging.log_statistics is off, which is Kong's default, so its"
            " calls have no tokens. Set it to true"
        )
        yield Finding(CHECK, Level.WARNING, text)


def _miscounts(plugin: Plugin, version: Version | None) -> Iterator[Finding]:
    providers = {provider for _, provider in _models(plugin.config)}
    open_faults = [
        f"{', '.join(sorted(providers & fault.providers))}: {fault.what}; fixed in {_series(fault.fixes)}"
        for fault in MISCOUNTS
        if providers & fault.providers and not (version and is_fixed(version, fault.fixes))
    ]
    if version is None and open_faults:
        text = (
            f"{plugin.name} ({plugin.place}): this source does not show Kong's version. Older ones miscount:"
            f" {'. '.join(open_faults)}"
        )
        yield Finding(CHECK, Level.OK, text)
    elif version is not None:
        for fault in open_faults:
            yield Finding(
                CHECK, Level.WARNING, f"{plugin.name} ({plugin.place}), Kong {_text(version)}, {fault}"
            )


def _models(config: Mapping[str, object]) -> Iterator[tuple[Mapping[str, object], str]]:
    """Yield the logging settings and the provider of each model of a plugin: Advanced has `targets`."""
    targets = config.get("targets")
    holders = targets if isinstance(targets, list) else [config.get("llm") or config]
    for holder in holders:
        target = _table(holder)
        provider = _table(target.get("model")).get("provider")
        yield _table(target.get("logging")), str(provider or "")


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _series(fixes: tuple[Version, ...]) -> str:
    return " and ".join(map(_text, fixes))


def _text(version: Version) -> str:
    """Return 3.9.1 for the open-source version 3.9.1 (0), 3.14.0.8 for one of Enterprise."""
    return ".".join(map(str, version[:3] if version[3:] == (0,) and version[2] else version))
