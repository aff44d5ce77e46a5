"""Receiver of the posts of Kong's bundled http-log plugin, for gateways that run no plugin servers.

Kong holds the logs in memory until their post is answered. On 2xx it forgets them; otherwise it posts them
again for `max_retry_time` (60 s by default) and then drops them. So a post gets its 200 only when all of its
records are on disk, one bad log never fails the others of its batch, and a disk that cannot be written is
503, early enough that Kong has not given up yet. A batch that is posted again makes the same event ids.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from openmeter_plugin.http_log.admission import Admission, RefusalError, Refusals, accepted, busy
from openmeter_plugin.http_log.config import HttpLogConfig, HttpLogSettings
from openmeter_plugin.http_log.splitter import EncodedRecord, Entry, EntrySplitter, NotJsonError
from openmeter_plugin.http_log.spooling import Post, Spooling
from openmeter_plugin.instances.instance import Instance, start_instance
from openmeter_plugin.instances.record import RoutedRecord, spool_record
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.lenient_json import identifier, json_object
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, PdkQuery
from openmeter_plugin.process.sockets import BACKLOG
from openmeter_plugin.process.web_server import EmbeddedServer, forward_log, limited_protocol
from openmeter_plugin.spool.writer import SpoolWriter

QUERY_FIELDS: Final[Mapping[PdkQuery, str]] = {
    PdkQuery.APPLICATION: "application_context",
    PdkQuery.CAPTURES: "uri_captures",
}
"""The members of an entry that hold the results of PDK queries, set by http-log's custom_fields_by_lua."""

_METHODS: Final = ("POST", "PUT", "PATCH")  # those that http-log can be configured to use
_INSTANCE_ID: Final = 0  # Kong's instances begin at 1
_SLICE_SECONDS: Final = 0.001  # of work before the event loop gets its turn
_MAX_HEAD: Final = 32 * 1024
_KEEP_ALIVE: Final = 75  # seconds; http-log keeps an idle connection for 60
_STOP_SECONDS: Final = 6


class Receiver:
    """Turns posts into records of the spool; `receive` is the HTTP endpoint."""

    def __init__(
        self, settings: HttpLogSettings, instance: Instance, writer: SpoolWriter, slice_seconds: float
    ) -> None:
        self._slice_seconds = slice_seconds
        self._read_timeout = settings.read_timeout
        self._instance = instance
        self._admission = Admission(settings)
        self._spooling = Spooling(writer, settings.write_timeout)
        self._refusals = Refusals()
        self._parsing = asyncio.Lock()
        self._bad_limit, self._failed_limit = RateLimit(), RateLimit()

    async def receive(self, request: Request) -> Response:
        """Answer a post."""
        post = Post(self._spooling)
        try:
            self._admission.check(request)
            await self._read(request, post)
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
        return accepted(post.requests, post.bad)

    async def _read(self, request: Request, post: Post) -> None:
        """Collect the records of the body's entries; raises RefusalError."""
        fast_path = self._instance.fast_path
        splitter = EntrySplitter(encode=fast_path.record if fast_path is not None else None)
        size = 0
        try:
            async with asyncio.timeout(self._read_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._admission.check_size(size)
                    if chunk:
                        await self._collect(splitter.feed(chunk), post)
                await self._collect(splitter.finish(), post)
        except TimeoutError:
            raise RefusalError(408, "the body did not arrive in time") from None
        except NotJsonError as error:
            raise RefusalError(400, f"the body is not what http-log posts: {error}") from None
        if post.bad and self._bad_limit.passes():
            get_logger().error("http_log_bad_records", records=post.bad, of=post.requests)

    async def _collect(self, entries: Iterator[Entry | None], post: Post) -> None:
        """Make the records of entries, in short slices and for only one post at a time."""
        async with self._parsing:
            slice_seconds = self._slice_seconds
            pause_at = time.perf_counter() + slice_seconds
            for entry in entries:
                if entry is not None:
                    bad = type(entry[0]) not in (dict, EncodedRecord)
                    post.add(entry_record(entry, post.requests, self._instance), bad=bad)
                if time.perf_counter() >= pause_at:
                    await asyncio.sleep(0)
                    pause_at = time.perf_counter() + slice_seconds


class HttpLogServer:
    """The HTTP server of the receiver, on the running event loop."""

    def __init__(
        self,
        listener: socket.socket,
        config: HttpLogConfig,
        writer: SpoolWriter,
        *,
        slice_seconds: float = _SLICE_SECONDS,
    ) -> None:
        instance = start_instance(_INSTANCE_ID, config.plugin, writer)
        receiver = Receiver(config.settings, instance, writer, slice_seconds)
        forward_log("http_log_server")
        self._server = EmbeddedServer(
            uvicorn.Config(
                Starlette(routes=[Route("/{path:path}", receiver.receive, methods=list(_METHODS))]),
                http=limited_protocol(config.settings.read_timeout, config.settings.max_connections),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=_MAX_HEAD,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Stop accepting posts, answer those under way, and return within a bound."""
        self._server.should_exit = True
        await self._serving


def entry_record(entry: Entry, position: int, instance: Instance) -> RoutedRecord:
    """Return the record of the entry at `position` in its post: the one the `openmeter` plugin would make."""
    log, raw = entry
    if type(log) is EncodedRecord:
        return instance.queue, log.record
    members: Mapping[str, Any] = json_object(log)
    if type(log) is dict:
        _identify(log, raw, position)
    # Query results are used only where needed, as the plugin does, so that the events are the same.
    results = NO_RESULTS
    while isinstance(record := spool_record(instance, log, results), PdkQuery):
        results = results.with_result(record, members.get(QUERY_FIELDS[record]))
    return record


def _identify(log: dict[str, Any], raw: bytes, position: int) -> None:
    """Give a log without a request id (before Kong 3.5) one that is the same if its batch is posted again."""
    request = log.get("request")
    if type(request) is not dict:
        request = log["request"] = {}
    if identifier(request.get("id")) is None:
        request["id"] = blake2b(raw, digest_size=16, salt=position.to_bytes(8)).hexdigest()
