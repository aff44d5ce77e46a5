"""The second way in: what Kong's bundled http-log plugin posts, for gateways that run no plugin servers.

Kong holds the logs in memory until they are answered: 2xx and it forgets them, anything else and it posts
them again, for `max_retry_time` (60 s by default), and then drops them. So the answer is 200 when all of
a post is on disk and not before, one bad log never fails the others of its batch, and a disk that takes
nothing is 503, soon enough that Kong still listens. A batch that comes again brings the same event ids.

Posts are received on the event loop that serves the plugin's RPCs, so nothing here takes long at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from openmeter_plugin.http_log_config import HttpLogConfig, HttpLogSettings
from openmeter_plugin.instances import Instance, start_instance
from openmeter_plugin.json_entries import Entry, EntrySplitter, NotJsonError
from openmeter_plugin.listening import BACKLOG
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.outcome import Spooled, spool_record
from openmeter_plugin.questions import NOTHING_ASKED, Needs
from openmeter_plugin.spool.writer import Item, SpoolQueue, SpoolWriter
from openmeter_plugin.values import identifier, table
from openmeter_plugin.web_server import GuestServer, forward_log, guarded_protocol

MEMBERS: Final[Mapping[Needs, str]] = {
    Needs.APPLICATION: "application_context",
    Needs.CAPTURES: "uri_captures",
}
"""Where an entry has the answers that the other way in asks Kong for: http-log's custom_fields_by_lua."""

_METHODS: Final = ("POST", "PUT", "PATCH")  # what http-log can be told to use
_INSTANCE_ID: Final = 0  # Kong's instances begin at 1
_SLICE: Final = 0.003  # seconds of work before the event loop gets its turn
_MOST_ENTRIES: Final = 100_000  # of one post
_MOST_BYTES_HELD: Final = 64 * 1024 * 1024  # of records of all posts that are not on disk yet
_RECORD_OVERHEAD: Final = 150
_LARGEST_HEAD: Final = 32 * 1024
_KEEP_ALIVE: Final = 75  # seconds; http-log keeps an idle connection for 60
_STOP_SECONDS: Final = 6
_RETRY_AFTER: Final = "2"
_MOST_DISCARDED: Final = 64 * 1024 * 1024
_DISCARD_SECONDS: Final = 2.0


class _RefusalError(Exception):
    """The post is not taken."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def _busy(message: str) -> _RefusalError:
    return _RefusalError(503, message, {"retry-after": _RETRY_AFTER})


class _Part:
    """The token of a record that is not the last of its post: nobody waits for it."""

    def answer(self) -> None:
        """Do nothing: the records of a post are committed in their order."""


_PART: Final = _Part()


class _Post:
    """A post while its records are collected and brought to the disk; the token of the last of them."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.items: list[Item] = []
        self.queues: set[SpoolQueue] = set()
        self.size = self.requests = self.bad = 0
        self.overdue = False  # handed over, but its answer could not wait
        self.answered = asyncio.get_running_loop().create_future()

    def add(self, spooled: Spooled) -> None:
        """Add the record of an entry; raises _RefusalError where there is no room."""
        if self.requests >= _MOST_ENTRIES:
            raise _RefusalError(413, f"a post may hold {_MOST_ENTRIES} logs; lower queue.max_batch_size")
        queue, record = spooled
        size = len(record) + _RECORD_OVERHEAD
        if self._receiver.held + size > _MOST_BYTES_HELD:
            raise _busy("too much is on its way to the disk")
        self._receiver.held += size
        self.size += size
        self.requests += 1
        self.queues.add(queue)
        self.items.append((queue, record, _PART, None))

    def hand_over(self, writer: SpoolWriter) -> None:
        """Bring the records to the spool, together, so that the last of them stands for all."""
        queue, record, _, _ = self.items.pop()
        writer.append_all([*self.items, (queue, record, self, None)])
        self.items = []

    def release(self) -> None:
        """Give back the room that the records took."""
        self._receiver.held -= self.size
        self._receiver.overdue.discard(self)
        self.items, self.size = [], 0

    def answer(self) -> None:
        """Note that the spool's writer is done with the post. Called on the event loop."""
        self.release()
        if not self.answered.done():
            self.answered.set_result(None)


class Receiver:
    """Takes posts apart into the spool's records; `receive` is the ASGI endpoint's work."""

    def __init__(self, settings: HttpLogSettings, instance: Instance, writer: SpoolWriter) -> None:
        self._settings = settings
        self._secrets = [secret.get_secret_value().encode() for secret in settings.secret]
        self._header = settings.header.encode()
        self._instance = instance
        self._writer = writer
        self._parsing = asyncio.Lock()
        self.held = 0
        self.overdue: set[_Post] = set()
        self._log = get_logger()
        self._refused_limit, self._bad_limit, self._failed_limit = RateLimit(), RateLimit(), RateLimit()

    async def receive(self, request: Request) -> Response:
        """Answer a post."""
        post = _Post(self)
        try:
            self._check_head(request)
            await self._read(request, post)
            await self._spool(post)
        except _RefusalError as refusal:
            return await self._refuse(request, refusal)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it; Kong posts the batch again
        except Exception:
            if self._failed_limit.passes():
                self._log.exception("http_log_failed")
            return await self._refuse(request, _busy("the post could not be handled, see the log"))
        finally:
            if not post.overdue:
                post.release()
        return _answer(200, {"requests": post.requests, "bad_records": post.bad})

    def _check_head(self, request: Request) -> None:
        """Raise _RefusalError for a post whose body need not be looked at."""
        if self._secrets and not self._knows_secret(request):
            raise _RefusalError(401, f"the header {self._settings.header} does not hold the shared secret")
        # Also keeps web pages out: a browser asks before it sends this type to another site.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _RefusalError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise _RefusalError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise self._too_large()

    def _knows_secret(self, request: Request) -> bool:
        given = [value for name, value in request.headers.raw if name == self._header]
        if len(given) != 1:
            return False
        # Each is compared, so that the time does not tell which one it was.
        known = False
        for secret in self._secrets:
            known |= hmac.compare_digest(given[0], secret)
        return known

    def _too_large(self) -> _RefusalError:
        limit = self._settings.max_body.human_readable()
        return _RefusalError(
            413, f"the body is larger than http_log.max_body ({limit}); lower queue.max_batch_size"
        )

    async def _read(self, request: Request, post: _Post) -> None:
        """Collect the records of the body's entries; raises _RefusalError."""
        splitter = EntrySplitter()
        size = 0
        try:
            async with asyncio.timeout(self._settings.read_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self._settings.max_body:
                        raise self._too_large()
                    if chunk:
                        await self._collect(splitter.feed(chunk), post)
                await self._collect(splitter.finish(), post)
        except TimeoutError:
            raise _RefusalError(408, "the body did not arrive in time") from None
        except NotJsonError as error:
            raise _RefusalError(400, f"the body is not what http-log posts: {error}") from None
        if post.bad and self._bad_limit.passes():
            self._log.error("http_log_bad_records", records=post.bad, of=post.requests)

    async def _collect(self, entries: Iterator[Entry | None], post: _Post) -> None:
        """Make the records of entries; of all posts only one does so at a time, and in short slices."""
        async with self._parsing:
            pause_at = time.perf_counter() + _SLICE
            for entry in entries:
                if entry is not None:
                    post.add(self._record(entry, post))
                if time.perf_counter() >= pause_at:
                    await asyncio.sleep(0)
                    pause_at = time.perf_counter() + _SLICE

    def _record(self, entry: Entry, post: _Post) -> Spooled:
        log, raw = entry
        members: Mapping[str, Any] = table(log)
        if type(log) is dict:
            _identify(log, raw, post.requests)
        else:
            post.bad += 1
        # Taken only where needed, as over the other way in: the events are to be the same.
        answers = NOTHING_ASKED
        while isinstance(spooled := spool_record(self._instance, log, answers), Needs):
            answers = answers.with_answer(spooled, members.get(MEMBERS[spooled]))
        return spooled

    async def _spool(self, post: _Post) -> None:
        """Bring the records to the disk; raises _RefusalError where that takes too long or fails."""
        if not post.items:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.write_timeout
        while self.overdue or any(queue.failing for queue in post.queues):
            # What is handed over now would only add to what waits in memory.
            if loop.time() >= deadline:
                raise _busy("the spool's disk takes nothing")
            await asyncio.sleep(0.02)
        post.hand_over(self._writer)
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(post.answered)
        except TimeoutError:
            post.overdue = True
            self.overdue.add(post)
            raise _busy("the spool's disk is too slow") from None
        if any(queue.failing for queue in post.queues):
            raise _busy("the spool's disk takes nothing")

    async def _refuse(self, request: Request, refusal: _RefusalError) -> Response:
        """Return the answer, where possible once the body is there: before that Kong does not read it."""
        if self._refused_limit.passes():
            self._log.warning(
                "http_log_refused",
                status=refusal.status,
                reason=refusal.message,
                refused_before=self._refused_limit.held_back(),
                consequence="Kong posts the batch again until its max_retry_time",
            )
        discarded = 0
        patience = 0.0 if refusal.status == 408 else _DISCARD_SECONDS
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(patience):
                async for chunk in request.stream():
                    discarded += len(chunk)
                    if discarded > _MOST_DISCARDED:
                        break
        return _answer(
            refusal.status, {"message": refusal.message}, {**refusal.headers, "connection": "close"}
        )


def _identify(log: dict[str, Any], raw: bytes, position: int) -> None:
    """Give a log without a request id (before Kong 3.5) one that is the same when its batch comes again."""
    request = log.get("request")
    if type(request) is not dict:
        request = log["request"] = {}
    if identifier(request.get("id")) is None:
        request["id"] = blake2b(raw, digest_size=16, salt=position.to_bytes(8)).hexdigest()


def _answer(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


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
