"""What is kept of a record that is set aside: nothing that an event may not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from openmeter_plugin.metering.event import Decision, decide
from openmeter_plugin.metering.lenient_json import identifier, put, table, usable_time
from openmeter_plugin.metering.pdk_queries import QueryResults
from openmeter_plugin.metering.rules import Rules
from openmeter_plugin.metering.subject import is_anonymous

_KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "request": ("id", "method", "size"),
    "response": ("status", "size"),
    "latencies": ("request", "proxy"),
    "route": ("id", "name"),
    "service": ("id", "name"),
    "consumer": ("id", "username", "custom_id"),
    "authenticated_entity": ("id",),
}
_KEPT_OF_USAGE: Final = ("prompt_tokens", "completion_tokens", "prompt_token", "completion_token")
_KEPT_OF_META: Final = ("request_model", "response_model", "provider_name")
_KEPT_OF_APPLICATION: Final = ("application_id", "developer_id", "portal_id", "organization_id")


def redacted(log: object) -> dict[str, Any]:
    """Return the log with nothing in it but what an event may be made of, in the same shape.

    For records that are set aside until their configuration is mended: `event.outcome` makes the
    same events of it. Headers and query arguments are gone, so lookups there find nothing.
    """
    source = table(log)
    kept: dict[str, Any] = {}
    for key, names in _KEPT.items():
        put(kept, key, _scalars(source.get(key), names))
    kept |= _scalars(source, ("started_at", "source", "workspace_name")) or {}
    tags = table(source.get("consumer")).get("tags")
    if "consumer" in kept and type(tags) is list:
        kept["consumer"]["tags"] = [tag for tag in tags if type(tag) is str]
    if is_anonymous(source):
        kept.setdefault("request", {})["headers"] = {"x-anonymous-consumer": "true"}
    put(kept, "ai", _redacted_ai(table(source.get("ai"))))
    return kept


def redacted_application(application: object) -> dict[str, Any] | None:
    """Return the named ids of an application context; newer gateways may put more into it."""
    return _scalars(application, _KEPT_OF_APPLICATION)


def _redacted_ai(ai: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks = {key: _ai_block(table(block)) for key, block in ai.items() if "usage" in table(block)}
    return (_ai_block(ai) | blocks) or None


def _ai_block(block: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    put(kept, "usage", _scalars(block.get("usage"), _KEPT_OF_USAGE))
    put(kept, "meta", _scalars(block.get("meta"), _KEPT_OF_META))
    return kept


def _scalars(value: object, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the named members that are text or numbers, or None: whatever else is there is not ours."""
    source = table(value)
    kept = {name: source[name] for name in names if type(source.get(name)) in (str, int, float)}
    return kept or None


# MERGED: Records that are set aside: redacted, with their reason, and how their events are made of them
# later.
#
# A record holds what an event may be made of and nothing else. So a replay finds a subject in the
# consumer (its tags too) and in the application, or gives all the same one; headers and query arguments,
# which hold credentials as often as not, are gone, and with them every subject that was looked for there.
# Attributes are kept as their values where the configuration said which they are; where the configuration
# itself could not be used, those of consumer tags and constants can be made again, the others cannot.


def quarantine_record(
    reason: str,
    log: object,
    answers: QueryResults,
    attributes: Mapping[str, Any] | None = None,
    *,
    destination: str | None = None,
    now_ms: int,
    new_id: Callable[[], str],
) -> dict[str, Any]:
    """Return what the spool keeps of a request until its cause is mended.

    A request that has no id or no time gets them now, so that its events are the same at each replay.
    """
    kept = redacted(log)
    request = kept.setdefault("request", {})
    if identifier(request.get("id")) is None:
        request["id"] = new_id()
    if usable_time(kept.get("started_at")) is None:
        kept["started_at"] = now_ms
    record = {"reason": reason, "log": kept, "application": redacted_application(answers.application)}
    if attributes:
        record["attributes"] = dict(attributes)
    if destination is not None:
        record["destination"] = destination
    return record


def replay_record(record: object, rules: Rules) -> Decision:
    """Return what becomes of a record that was set aside under these rules; never Needs."""
    kept = table(record)
    log = table(kept.get("log"))
    answers = QueryResults(application=kept.get("application"), captures=None)
    made = decide(log, answers, rules, now_ms=0, new_id=lambda: "replayed")
    attributes = table(kept.get("attributes"))
    if attributes and isinstance(made, list):
        return [event | {"data": dict(attributes) | event["data"]} for event in made]
    return made
