"""The second way in: what Kong's bundled http-log plugin posts, for gateways that run no plugin servers.

Kong holds the logs in memory until they are answered: 2xx and it forgets them, anything else and it posts
them again, for `max_retry_time` (60 s by default), and then drops them. So the answer is 200 when all of
a post is on disk and not before, one bad log never fails the others of its batch, and a disk that takes
nothing is 503, soon enough that Kong still listens. A batch that comes again brings the same event ids.

Posts are received on the event loop that serves the plugin's RPCs, so nothing here takes long at once:
a post is read, parsed, made into records and brought to the disk in steps of a millisecond or so.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
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
from openmeter_plugin.http_log.splitter import Entry, EntrySplitter, NotJsonError, Ready
from openmeter_plugin.http_log.spooling import Post, Spooling
from openmeter_plugin.instances.instance import Instance, start_instance
from openmeter_plugin.instances.record import Spooled, spool_record
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.lenient_json import identifier, json_object
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, PdkQuery
from openmeter_plugin.process.sockets import BACKLOG
from openmeter_plugin.process.web_server import GuestServer, forward_log, guarded_protocol
from openmeter_plugin.spool.writer import SpoolWriter

# MERGED: From an entry of a post to the spool's record: the same that the plugin makes of the same request.

MEMBERS: Final[Mapping[PdkQuery, str]] = {
    PdkQuery.APPLICATION: "application_context",
    PdkQuery.CAPTURES: "uri_captures",
}
"""Where an entry has the answers that the other way in asks Kong for: http-log's custom_fields_by_lua."""


def record_of(entry: Entry, position: int, instance: Instance) -> Spooled:
    """Return the record of the entry at this position of its post."""
    log, raw = entry
    if type(log) is Ready:
        return instance.queue, log.record
    members: Mapping[str, Any] = json_object(log)
    if type(log) is dict:
        _identify(log, raw, position)
    # Taken only where needed, as over the other way in: the events are to be the same.
    answers = NO_RESULTS
    while isinstance(spooled := spool_record(instance, log, answers), PdkQuery):
        answers = answers.with_result(spooled, members.get(MEMBERS[spooled]))
    return spooled


def _identify(log: dict[str, Any], raw: bytes, position: int) -> None:
    """Give a log without a request id (before Kong 3.5) one that is the same when its batch comes again."""
    request = log.get("request")
    if type(request) is not dict:
        request = log["request"] = {}
    if identifier(request.get("id")) is None:
        request["id"] = blake2b(raw, digest_size=16, salt=position.to_bytes(8)).hexdigest()


_METHODS: Final = ("POST", "PUT", "PATCH")  # what http-log can be told to use
_INSTANCE_ID: Final = 0  # Kong's instances begin at 1
_SLICE: Final = 0.001  # seconds of work before the event loop gets its turn
_SWITCH: Final = 0.0005  # seconds that the spool's writer waits for the interpreter while posts are parsed
_LARGEST_HEAD: Final = 32 * 1024
_KEEP_ALIVE: Final = 75  # seconds; http-log keeps an idle connection for 60
_STOP_SECONDS: Final = 6


class Receiver:
    """Takes posts apart into the spool's records; `receive` is the ASGI endpoint's work."""

    def __init__(self, settings: HttpLogSettings, instance: Instance, writer: SpoolWriter) -> None:
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
            return Response(status_code=400)  # nobody reads it; Kong posts the batch again
        except Exception:
            if self._failed_limit.passes():
                get_logger().exception("http_log_failed")
            return await self._refusals.answer(request, busy("the post could not be handled, see the log"))
        finally:
            post.release()
        return accepted(post.requests, post.bad)

    async def _read(self, request: Request, post: Post) -> None:
        """Collect the records of the body's entries; raises RefusalError."""
        usual = self._instance.usual
        splitter = EntrySplitter(short_way=usual.record if usual is not None else None)
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
        """Make the records of entries; of all posts only one does so at a time, and in short slices."""
        async with self._parsing:
            pause_at = time.perf_counter() + _SLICE
            for entry in entries:
                if entry is not None:
                    bad = type(entry[0]) not in (dict, Ready)
                    post.add(record_of(entry, post.requests, self._instance), bad=bad)
                if time.perf_counter() >= pause_at:
                    await asyncio.sleep(0)
                    pause_at = time.perf_counter() + _SLICE


def prepare_process() -> None:
    """Have a process that is to receive posts keep serving others meanwhile; once, before it serves.

    Neither may what is imported here be searched for garbage in the middle of a request, nor the spool's
    writer wait for the interpreter's usual 5 ms whenever it has written something.
    """
    gc.freeze()
    sys.setswitchinterval(_SWITCH)


class HttpLog:
    """The receiver, served on the running event loop."""

    def __init__(self, listener: socket.socket, config: HttpLogConfig, writer: SpoolWriter) -> None:
        instance = start_instance(_INSTANCE_ID, config.plugin, writer)
        receiver = Receiver(config.settings, instance, writer)
        forward_log("http_log_server")
        self._server = GuestServer(
            uvicorn.Config(
                Starlette(routes=[Route("/{path:path}", receiver.receive, methods=list(_METHODS))]),
                http=guarded_protocol(config.settings.read_timeout, config.settings.max_connections),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=_LARGEST_HEAD,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Take no more posts, answer those under way, and return; within a bound."""
        self._server.should_exit = True
        await self._serving
