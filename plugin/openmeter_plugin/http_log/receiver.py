"""Receiver of the posts of Kong's bundled http-log plugin, for gateways that run no plugin servers.

Kong holds the logs in memory until their post is answered. On 2xx it forgets them; otherwise it posts them
again for `max_retry_time` (60 s by default) and then drops them. So a post gets its 200 only when all of its
records are on disk, one bad log never fails the others of its batch, and a disk that cannot be written is
503, early enough that Kong has not given up yet. A batch that is posted again makes the same event ids.

Kong encodes each log with lua-cjson and joins them with commas, so nearly every body is JSON. It is split
without creating a value: 14 MB take 50 to 110 ms, whatever they contain (orjson: up to 600 ms), and each log
is decoded later into the few members that an event needs. A body with an entry that is not JSON is split by
its brackets instead, so that one bad log does not fail its batch. lua-cjson never writes such an entry: it
escapes control characters, refuses NaN and more than 1000 levels, and copies bytes that are not UTF-8, which
are no hindrance here.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from openmeter_plugin.http_log.admission import Admission, RefusalError, Refusals, accepted, busy
from openmeter_plugin.http_log.config import HttpLogConfig, HttpLogSettings
from openmeter_plugin.http_log.spooling import MAX_ENTRIES, Memory, Post, Spooling
from openmeter_plugin.instances.instance import Instance, start_instance
from openmeter_plugin.instances.record import BAD_RECORD, RoutedRecord, spool_record
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.kong_log import NO_RESULTS, PdkQuery
from openmeter_plugin.metering.lenient_json import json_object, parse_log
from openmeter_plugin.process.sockets import BACKLOG, loopback_hosts
from openmeter_plugin.process.web_server import EmbeddedServer, forward_log, limited_protocol
from openmeter_plugin.spool.writer import SpoolWriter

QUERY_FIELDS: Final[Mapping[PdkQuery, str]] = {
    PdkQuery.APPLICATION: "application_context",
    PdkQuery.CAPTURES: "uri_captures",
}
"""The members of an entry that hold the results of PDK queries, set by http-log's custom_fields_by_lua."""

_METHODS: Final = ("POST", "PUT", "PATCH")  # those that http-log can be configured to use
_INSTANCE_ID: Final = 0  # Kong's instances begin at 1
_MAX_QUICK_BYTES: Final = 128 * 1024
"""Of a body that is decoded on the event loop, in some milliseconds. Larger ones take up to some hundred, in
which the loop must give heartbeats and receive other posts."""
_MAX_BODY_BYTES: Final = 64 * 1024 * 1024  # of all posts that are being received or decoded
_MAX_HEAD: Final = 32 * 1024
_KEEP_ALIVE: Final = 75  # seconds; http-log keeps an idle connection for 60
_STOP_SECONDS: Final = 6


class Receiver:
    """Turns posts into records of the spool; `receive` is the HTTP endpoint."""

    def __init__(
        self, settings: HttpLogSettings, instance: Instance, writer: SpoolWriter, hosts: frozenset[str] | None
    ) -> None:
        self._read_timeout = settings.read_timeout
        self._instance = instance
        self._admission = Admission(settings, hosts)
        self._spooling = Spooling(writer, settings.write_timeout)
        self._refusals = Refusals()
        self._bodies = Memory(max(_MAX_BODY_BYTES, settings.max_body), "too many posts are being received")
        self._decoding = asyncio.Lock()  # one large body at a time
        self._bad_limit, self._failed_limit = RateLimit(), RateLimit()

    async def receive(self, request: Request) -> Response:
        """Answer a post."""
        post = Post(self._spooling)
        try:
            self._admission.check(request)
            records = await self._records(request)
            for routed in records:
                post.add(routed)
            bad = sum(record is BAD_RECORD for _, record in records)
            if bad and self._bad_limit.passes():
                get_logger().error("http_log_bad_records", records=bad, of=len(records))
            await self._spooling.spool(post)
        except RefusalError as refusal:
            return await self._refusals.answer(request, refusal)
        except ClientDisconnect:
            return Response(status_code=400)  # not read by anyone; Kong posts the batch again
        except Exception:
            if self._failed_limit.passes():
                get_logger().exception("http_log_failed")
            return await self._refusals.answer(request, busy("internal error, see the plugin server's log"))
        finally:
            post.release()
        return accepted(len(records), bad)

    async def _records(self, request: Request) -> list[RoutedRecord]:
        """Receive the body and return its records; raises RefusalError."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._read_timeout):
                async for chunk in request.stream():
                    self._admission.check_size(len(body) + len(chunk))
                    self._bodies.reserve(len(chunk))
                    body += chunk
            if len(body) <= _MAX_QUICK_BYTES:
                return records_of(body, self._instance)
            async with self._decoding:
                return await asyncio.to_thread(records_of, body, self._instance)
        except TimeoutError:
            raise RefusalError(408, "the body did not arrive in time") from None
        except NotJsonError as error:
            raise RefusalError(400, f"the body is not what http-log posts: {error}") from None
        finally:
            self._bodies.release(len(body))


class HttpLogServer:
    """The HTTP server of the receiver, on the running event loop."""

    def __init__(self, listener: socket.socket, config: HttpLogConfig, writer: SpoolWriter) -> None:
        instance = start_instance(_INSTANCE_ID, config.plugin, writer)
        # A shared secret keeps other senders out by itself.
        hosts = None if config.settings.secret else loopback_hosts(listener)
        receiver = Receiver(config.settings, instance, writer, hosts)
        forward_log("http_log_server")
        self._server = EmbeddedServer(
            Starlette(routes=[Route("/{path:path}", receiver.receive, methods=list(_METHODS))]),
            http=limited_protocol(config.settings.read_timeout, config.settings.max_connections),
            interface="asgi3",
            date_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=_MAX_HEAD,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Stop accepting posts, answer those under way, and return within a bound."""
        self._server.end()
        await self._serving


def records_of(body: bytes | bytearray, instance: Instance) -> list[RoutedRecord]:
    """Return the records of a body's entries; raises NotJsonError, and RefusalError for too many."""
    records: list[RoutedRecord] = []
    for position, raw in enumerate(entries(body)):
        if position >= MAX_ENTRIES:
            raise RefusalError(413, f"a post may hold at most {MAX_ENTRIES} logs; lower queue.max_batch_size")
        records.append(entry_record(raw, position, instance))
    return records


def entry_record(raw: bytes, position: int, instance: Instance) -> RoutedRecord:
    """Return the record of the entry at `position` in its post: the one the `openmeter` plugin would make."""
    new_id = partial(_stable_id, raw, position)
    # Query results are used only where needed, as the plugin does, so that the events are the same.
    results = NO_RESULTS
    while isinstance(record := spool_record(instance, raw, results, new_id), PdkQuery):
        results = results.with_result(record, _query_result(raw, record))
    return record


def _stable_id(raw: bytes, position: int) -> str:
    """Return an id for a log without one (before Kong 3.5): the same if its batch is posted again."""
    return blake2b(raw, digest_size=16, salt=position.to_bytes(8)).hexdigest()


class _QueryResults(msgspec.Struct):
    application_context: Any = None
    uri_captures: Any = None


_decode_results: Final = msgspec.json.Decoder(_QueryResults).decode


def _query_result(raw: bytes, query: PdkQuery) -> object:
    name = QUERY_FIELDS[query]
    try:
        return getattr(_decode_results(raw), name)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return json_object(parse_log(raw)).get(name)


# Splitting of bodies

MAX_FAST_COMMAS: Final = 2_000_000
"""Of a body that is split at once. 16 MiB of ordinary logs have a third of them. Each entry costs 50 bytes of
memory, and a body could hold millions of empty ones."""

_WHITE_SPACE: Final = b" \t\r\n"
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
_split: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


class NotJsonError(ValueError):
    """The body is neither a JSON array nor a JSON object; the message says why."""


def entries(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield the elements of the array, or the object that is the whole body; raises NotJsonError."""
    begin = body[:1] if body[:1] not in _WHITE_SPACE else body.lstrip(_WHITE_SPACE)[:1]
    if not begin:
        raise NotJsonError("the body is empty")
    if begin == b"{":
        yield from _alone(body)
    elif begin != b"[":
        raise NotJsonError("the body is neither a JSON array nor a JSON object")
    elif body.count(b",") > MAX_FAST_COMMAS:
        yield from _by_brackets(body)
    else:
        try:
            found = _split(body)
        except (msgspec.DecodeError, RecursionError):
            yield from _by_brackets(body)
        else:
            yield from map(bytes, found)


def _alone(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield the object, which may contain errors but must be whole."""
    found = list(_by_brackets(b"[" + body + b"]"))
    if len(found) != 1:
        raise NotJsonError("something follows the end of the JSON")
    yield from found


def _by_brackets(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield what is between the commas of the outermost array, JSON or not."""
    start = body.index(b"[") + 1
    depth, count = 0, 0
    for token in _TOKEN.finditer(body, start):
        kind = body[token.start()]
        if kind == _QUOTE or (kind == _COMMA and depth):
            continue
        if kind in _OPENING:
            depth += 1
        elif depth:
            depth -= 1
        else:
            entry = bytes(body[start : token.start()]).strip(_WHITE_SPACE)
            start = token.end()
            if entry or count or kind == _COMMA:  # otherwise the array is empty
                yield entry
            count += 1
            if kind != _COMMA:
                if body[start:].strip(_WHITE_SPACE):
                    raise NotJsonError("something follows the end of the JSON")
                return
    raise NotJsonError("the body ends within the JSON")


_QUOTE: Final = ord('"')
_COMMA: Final = ord(",")
_OPENING: Final = b"[{"
