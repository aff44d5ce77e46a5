"""From the lines of a Kong segment to records of the spool, by the one way that all inputs share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Final, NamedTuple

import msgspec
import orjson

from openmeter_plugin.instances.instance import Instance
from openmeter_plugin.instances.record import RoutedRecord, spool_record
from openmeter_plugin.metering.ai_usage import with_metrics
from openmeter_plugin.metering.kong_log import NO_RESULTS, PdkQuery
from openmeter_plugin.metering.lenient_json import encode_json, json_object, parse_log
from openmeter_plugin.segments.line_format import INSTANCE_ID, Flaw, Line, head_version, scan
from openmeter_plugin.spool.segment import HEAD_SIZE, LOST, encode_record

FindInstance = Callable[[str], Instance | None]
_INSTANCE_ID: Final = re.compile(INSTANCE_ID)
_NOTHING: Final = msgspec.Raw(b"null")
_AI_METRICS: Final = b'"ai_metrics"'


class _Request(msgspec.Struct, gc=False):
    """A line's payload. Only the instance's id is decoded: all else may be no valid UTF-8."""

    i: str
    log: msgspec.Raw = _NOTHING
    x: msgspec.Raw = _NOTHING


_decode: Final = msgspec.json.Decoder(_Request).decode


class Converted(NamedTuple):
    """The records of a span of a segment."""

    records: list[RoutedRecord]
    lost: Counter[str]
    """Lines that hold no request any more, by cause."""
    end: int
    """The offset up to which the span was converted."""
    unknown: str | None
    """The id of the instance that is unknown, if the span ends before a line of it."""


def convert(data: bytes, base: int, find: FindInstance, *, final: bool) -> Converted:
    """Return the records of the lines in `data`, which starts with a line at offset `base` of a segment.

    The same bytes give the same records again. `final` is that of `scan`.
    """
    records: list[RoutedRecord] = []
    lost: Counter[str] = Counter()
    end = base
    instances: dict[str, Instance] = {}
    for content, line_end in _without_last_flaws(scan(data, base, final=final), final=final):
        if isinstance(content, Flaw):
            # At a segment's begin it is the head that is damaged.
            if end > 0 and content is not Flaw.REMAINDER:
                lost[content.value] += 1
            end = line_end
            continue
        request = _parse(content)
        if request is None or (request.i not in instances and not _INSTANCE_ID.fullmatch(request.i)):
            if not (base == 0 and head_version(content) is not None):
                lost[Flaw.DAMAGED.value] += 1
            end = line_end
            continue
        instance = instances.get(request.i)
        if instance is None:
            instance = find(request.i)
            if instance is None:
                return Converted(records, lost, end, request.i)
            instances[request.i] = instance
        records.append(_record(instance, request, content, line_end))
        end = line_end
    return Converted(records, lost, end, None)


def _without_last_flaws(lines: list[Line], *, final: bool) -> list[Line]:
    """Leave flaws at the end for the next span, unless there is nothing else: more pieces may follow."""
    number = len(lines)
    while not final and number and isinstance(lines[number - 1].content, Flaw):
        number -= 1
    return lines[:number] if 0 < number < len(lines) else lines


def _parse(content: bytes) -> _Request | None:
    """Return a line's request; None if it is none, whose checksum is right nevertheless."""
    try:
        return _decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _record(instance: Instance, request: _Request, content: bytes, position: int) -> RoutedRecord:
    raw = _log(request)
    new_id = partial(_stable_id, content, position)
    results = NO_RESULTS
    # Query results are used only where needed, as the plugin server does, so that the events are the same.
    while isinstance(record := spool_record(instance, raw, results, new_id), PdkQuery):
        results = results.with_result(record, _query_result(request, record))
    return record


def _log(request: _Request) -> bytes:
    """Return a line's log, completed by the usage that Kong counted but did not log, if there is any."""
    raw = bytes(request.log)
    if _AI_METRICS not in bytes(request.x):
        return raw
    metrics = json_object(parse_log(bytes(request.x))).get("ai_metrics")
    log = json_object(parse_log(raw))
    completed = with_metrics(log, metrics)
    return raw if completed is log else encode_json(completed)


def _query_result(request: _Request, query: PdkQuery) -> object:
    extra = json_object(parse_log(bytes(request.x)))
    if query is PdkQuery.CAPTURES:
        captures = extra.get("captures")
        return None if captures is None else {"named": captures}
    return json_object(extra.get("shared")).get("kaa_application_context")


def _stable_id(content: bytes, position: int) -> str:
    """Return an id for a log without one: the same if its line is read again."""
    return blake2b(content, digest_size=16, salt=position.to_bytes(8)).hexdigest()


def lost_record(cause: str, count: int) -> bytes:
    """Return the record that counts lost requests."""
    return encode_record(LOST + orjson.dumps({"count": count, "reason": cause}))


def split_records(data: bytes) -> list[bytes]:
    """Return encoded records one by one: a request with very many events has several."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + HEAD_SIZE + int.from_bytes(data[at + 4 : at + 8], "little")
        found.append(data[at:end])
        at = end
    return found
