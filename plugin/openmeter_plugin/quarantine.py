"""Records that are set aside: redacted, with their reason, and how their events are made of them later.

A record holds what an event may be made of and nothing else. So a replay finds a subject in the
consumer (its tags too) and in the application, or gives all the same one; headers and query arguments,
which hold credentials as often as not, are gone, and with them every subject that was looked for there.
Attributes are kept as their values where the configuration said which they are; where the configuration
itself could not be used, those of consumer tags and constants can be made again, the others cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openmeter_plugin.event import Outcome, outcome
from openmeter_plugin.questions import Answers
from openmeter_plugin.redact import redacted, redacted_application
from openmeter_plugin.rules import Rules
from openmeter_plugin.timestamps import usable_time
from openmeter_plugin.values import identifier, table


def set_aside(
    reason: str,
    log: object,
    answers: Answers,
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


def replayed(record: object, rules: Rules) -> Outcome:
    """Return what becomes of a record that was set aside under these rules; never Needs."""
    kept = table(record)
    log = table(kept.get("log"))
    answers = Answers(application=kept.get("application"), captures=None)
    made = outcome(log, answers, rules, now_ms=0, new_id=lambda: "replayed")
    attributes = table(kept.get("attributes"))
    if attributes and isinstance(made, list):
        return [event | {"data": dict(attributes) | event["data"]} for event in made]
    return made
