"""Bringing the records of a post to the disk, and knowing when all of them are there.

They go piece by piece, each when the one before it is on disk: a request of the plugin that comes meanwhile
waits for one piece and not for the post.
"""

from __future__ import annotations

import asyncio
from typing import Final

from openmeter_plugin.http_log.admission import RefusalError, busy
from openmeter_plugin.instances.record import Spooled
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_ENTRIES: Final = 100_000  # of one post
_MAX_BYTES_HELD: Final = 64 * 1024 * 1024  # of records of all posts that are not on disk yet
_RECORD_OVERHEAD: Final = 150
_MAX_RECORDS_AT_ONCE: Final = 1000
_MAX_BYTES_AT_ONCE: Final = 512 * 1024
_LOOK_AGAIN: Final = 0.02  # seconds, at a disk that takes nothing


class _Part:
    """The token of a record that is not the last of its piece: nobody waits for it."""

    def answer(self) -> None:
        """Do nothing: the records of a piece are committed in their order."""


_PART: Final = _Part()


class _Piece:
    """Records that go to the disk together; the token of the last of them."""

    def __init__(self, spooling: Spooling, size: int) -> None:
        self._spooling = spooling
        self.size = size
        self.written = asyncio.get_running_loop().create_future()

    def answer(self) -> None:
        """Note that the spool's writer is done with the piece. Called on the event loop."""
        self._spooling.done_with(self)
        if not self.written.done():
            self.written.set_result(None)


class Post:
    """The records of a post, as long as they are collected and brought to the disk."""

    def __init__(self, spooling: Spooling) -> None:
        self._spooling = spooling
        self._records: list[bytes] = []
        self._queues: list[SpoolQueue] = []  # of each record
        self._size = 0
        self.requests = self.bad = 0

    def add(self, spooled: Spooled, *, bad: bool) -> None:
        """Add the record of an entry; raises RefusalError where there is no room."""
        if self.requests >= _MAX_ENTRIES:
            raise RefusalError(413, f"a post may hold {_MAX_ENTRIES} logs; lower queue.max_batch_size")
        queue, record = spooled
        size = len(record) + _RECORD_OVERHEAD
        self._spooling.hold(size)
        self._size += size
        self.requests += 1
        self.bad += bad
        self._queues.append(queue)
        self._records.append(record)

    @property
    def queues(self) -> set[SpoolQueue]:
        """Where the records go."""
        return set(self._queues)

    def piece(self, start: int) -> tuple[list[Spooled], int]:
        """Return the records from `start` on that go to the disk together, and the room that they take."""
        piece: list[Spooled] = []
        size = 0
        for queue, record in zip(
            self._queues[start : start + _MAX_RECORDS_AT_ONCE],
            self._records[start : start + _MAX_RECORDS_AT_ONCE],
            strict=True,
        ):
            size += len(record) + _RECORD_OVERHEAD
            piece.append((queue, record))
            if size >= _MAX_BYTES_AT_ONCE:
                break
        return piece, size

    def handed_over(self, size: int) -> None:
        """Leave it to a piece to give back so much of the room."""
        self._size -= size

    def release(self) -> None:
        """Give back the room of the records that are not on their way to the disk."""
        self._spooling.hold(-self._size)
        self._records, self._queues, self._size = [], [], 0


class Spooling:
    """The way to the disk, which the posts share."""

    def __init__(self, writer: SpoolWriter, write_timeout: float) -> None:
        self._writer = writer
        self._write_timeout = write_timeout
        self._held = 0
        self._overdue: set[_Piece] = set()

    def hold(self, size: int) -> None:
        """Take so much room in memory, or give it back; raises RefusalError where there is none."""
        if size > 0 and self._held + size > _MAX_BYTES_HELD:
            raise busy("too much is on its way to the disk")
        self._held += size

    async def spool(self, post: Post) -> None:
        """Bring the records to the disk; raises RefusalError where that takes too long or fails."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._write_timeout
        queues = post.queues
        while self._overdue or any(queue.failing for queue in queues):
            # What is handed over now would only add to what waits in memory.
            if loop.time() >= deadline:
                raise busy("the spool's disk takes nothing")
            await asyncio.sleep(_LOOK_AGAIN)
        start = 0
        while start < post.requests:
            records, size = post.piece(start)
            start += len(records)
            piece = _Piece(self, size)
            post.handed_over(size)
            self._hand_over(piece, records)
            await self._written(piece, deadline)
            if any(queue.failing for queue in queues):
                raise busy("the spool's disk takes nothing")

    def _hand_over(self, piece: _Piece, records: list[Spooled]) -> None:
        """Have the records written together, so that the last of them stands for all."""
        items: list[Item] = [(queue, record, _PART, None) for queue, record in records]
        queue, record = records[-1]
        items[-1] = (queue, record, piece, None)
        self._writer.append_all(items)

    async def _written(self, piece: _Piece, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(piece.written)
        except TimeoutError:
            self._overdue.add(piece)
            raise busy("the spool's disk is too slow") from None

    def done_with(self, piece: _Piece) -> None:
        """Give back the room of a piece that is on disk, or wherever the writer keeps it now."""
        self.hold(-piece.size)
        self._overdue.discard(piece)
