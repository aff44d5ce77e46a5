"""Spooling of posts: writes the records of a post to the disk, and waits until all of them are there.

They are written in pieces, each after the previous one is on disk: a disk that fails or hangs is noticed
after one piece, and no more than that piece waits in memory for it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from openmeter_plugin.http_log.admission import busy
from openmeter_plugin.instances.record import RoutedRecord
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

MAX_ENTRIES: Final = 100_000  # of one post
_MAX_RESERVED_BYTES: Final = 64 * 1024 * 1024  # for records of all posts that are not on disk yet
_RECORD_OVERHEAD: Final = 150
_MAX_PIECE_RECORDS: Final = 1000
_MAX_PIECE_BYTES: Final = 512 * 1024
_POLL_SECONDS: Final = 0.02  # between two checks of a disk that cannot be written


class Memory:
    """A limit on the memory that posts use together."""

    def __init__(self, limit: int, refusal: str) -> None:
        self._limit = limit
        self._refusal = refusal
        self._used = 0

    def reserve(self, size: int) -> None:
        """Reserve memory; raises RefusalError above the limit."""
        if self._used + size > self._limit:
            raise busy(self._refusal)
        self._used += size

    def release(self, size: int) -> None:
        """Release reserved memory."""
        self._used -= size


class _Part:
    """The token of each record but the last of a piece; nothing waits for it."""

    def answer(self) -> None:
        """Do nothing: the records of a piece are committed in their order."""


_PART: Final = _Part()


class _Piece:
    """Records that are written together; serves as the token of the last one."""

    def __init__(self, spooling: Spooling, size: int) -> None:
        self._spooling = spooling
        self.size = size
        self.written = asyncio.get_running_loop().create_future()

    def answer(self) -> None:
        """Note that the spool's writer has finished the piece. Called on the event loop."""
        self._spooling.finished(self)
        if not self.written.done():
            self.written.set_result(None)


class Post:
    """The records of a post while they are collected and written."""

    def __init__(self, spooling: Spooling) -> None:
        self._spooling = spooling
        self._records: list[bytes] = []
        self._queues: list[SpoolQueue] = []  # of each record
        self._size = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, routed: RoutedRecord) -> None:
        """Add the record of an entry; raises RefusalError if there is no room."""
        queue, record = routed
        size = len(record) + _RECORD_OVERHEAD
        self._spooling.memory.reserve(size)
        self._size += size
        self._queues.append(queue)
        self._records.append(record)

    @property
    def queues(self) -> set[SpoolQueue]:
        """The queues that the records go to."""
        return set(self._queues)

    def piece(self, start: int) -> tuple[list[RoutedRecord], int]:
        """Return the records from `start` on that are written together, and their size in memory."""
        piece: list[RoutedRecord] = []
        size = 0
        for queue, record in zip(
            self._queues[start : start + _MAX_PIECE_RECORDS],
            self._records[start : start + _MAX_PIECE_RECORDS],
            strict=True,
        ):
            size += len(record) + _RECORD_OVERHEAD
            piece.append((queue, record))
            if size >= _MAX_PIECE_BYTES:
                break
        return piece, size

    def handed_over(self, size: int) -> None:
        """Leave it to a piece to release `size` bytes of the reserved memory."""
        self._size -= size

    def release(self) -> None:
        """Release the memory of the records that were not handed over to be written."""
        self._spooling.memory.release(self._size)
        self._records, self._queues, self._size = [], [], 0


class Spooling:
    """Writes the records of all posts, within a shared limit of memory."""

    def __init__(self, writer: SpoolWriter, write_timeout: float) -> None:
        self._writer = writer
        self._write_timeout = write_timeout
        self.memory = Memory(_MAX_RESERVED_BYTES, "too many records are waiting for the disk")
        self._overdue: set[_Piece] = set()

    async def spool(self, post: Post) -> None:
        """Write a post's records; raises RefusalError if that takes too long or fails."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._write_timeout
        queues = post.queues
        while self._overdue or any(queue.failing for queue in queues):
            # Records handed over now would only pile up in memory.
            if loop.time() >= deadline:
                raise busy("the spool's disk cannot be written")
            await asyncio.sleep(_POLL_SECONDS)
        start = 0
        while start < len(post):
            records, size = post.piece(start)
            start += len(records)
            piece = _Piece(self, size)
            post.handed_over(size)
            self._hand_over(piece, records)
            await self._wait(piece, deadline)
            if any(queue.failing for queue in queues):
                raise busy("the spool's disk cannot be written")

    def _hand_over(self, piece: _Piece, records: list[RoutedRecord]) -> None:
        """Queue the records to be written together; the last one's token answers for all of them."""
        items: list[Item] = [(queue, record, _PART, None) for queue, record in records]
        queue, record = records[-1]
        items[-1] = (queue, record, piece, None)
        self._writer.append_all(items)

    async def _wait(self, piece: _Piece, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(piece.written)
        except TimeoutError:
            self._overdue.add(piece)
            raise busy("the spool's disk is too slow") from None

    def finished(self, piece: _Piece) -> None:
        """Release the memory of a piece that is on disk, or that the writer keeps for later."""
        self.memory.release(piece.size)
        self._overdue.discard(piece)
