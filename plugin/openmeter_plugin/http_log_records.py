"""From an entry of a post to the spool's record: the same that the plugin makes of the same request."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

from openmeter_plugin.instances import Instance
from openmeter_plugin.json_entries import Entry, Ready
from openmeter_plugin.outcome import Spooled, spool_record
from openmeter_plugin.questions import NOTHING_ASKED, Needs
from openmeter_plugin.values import identifier, table

MEMBERS: Final[Mapping[Needs, str]] = {
    Needs.APPLICATION: "application_context",
    Needs.CAPTURES: "uri_captures",
}
"""Where an entry has the answers that the other way in asks Kong for: http-log's custom_fields_by_lua."""


def record_of(entry: Entry, position: int, instance: Instance) -> Spooled:
    """Return the record of the entry at this position of its post."""
    log, raw = entry
    if type(log) is Ready:
        return instance.queue, log.record
    members: Mapping[str, Any] = table(log)
    if type(log) is dict:
        _identify(log, raw, position)
    # Taken only where needed, as over the other way in: the events are to be the same.
    answers = NOTHING_ASKED
    while isinstance(spooled := spool_record(instance, log, answers), Needs):
        answers = answers.with_answer(spooled, members.get(MEMBERS[spooled]))
    return spooled


def _identify(log: dict[str, Any], raw: bytes, position: int) -> None:
    """Give a log without a request id (before Kong 3.5) one that is the same when its batch comes again."""
    request = log.get("request")
    if type(request) is not dict:
        request = log["request"] = {}
    if identifier(request.get("id")) is None:
        request["id"] = blake2b(raw, digest_size=16, salt=position.to_bytes(8)).hexdigest()
