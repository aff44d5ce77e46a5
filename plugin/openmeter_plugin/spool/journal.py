"""Journal of an input that reads files: what it is about to write, and where.

If such an input is killed between writing records and noting how far it has read, its successor has to find
out which records are written. So before each batch it writes down which spans it reads and where its own
segments end. Their names distinguish them from all others, and only it appends to them. The successor counts
the records behind those ends: exactly these are written, in the order of the batch.

The file holds two slots that are written in turn, each with a checksum. If one was not written completely, no
record of its batch was written, and the other one still has the batch before it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.spool.destination import queues_directory
from openmeter_plugin.spool.queue import writer_and_number
from openmeter_plugin.spool.reader import read_segment, segment_names
from openmeter_plugin.spool.segment import Record

FILE: Final = "kong-segments.journal"
SLOT_SIZE: Final = 8 * 1024 * 1024  # sparse: a few hundred bytes are used
_RESERVED: Final = 64 * 1024  # bytes of each slot that a full disk cannot refuse
_HEAD: Final = struct.Struct("<QII")

Marks = Mapping[str, tuple[int, int]]
"""By queue: the number of the segment in which the next record may be, and its size so far."""


class JournalTakenError(Exception):
    """Another process reads for this spool."""


class Journal:
    """The journal of a spool, locked for as long as it is open. Raises OSError, also later ones."""

    def __init__(self, spool: Path, *, sync: bool = False) -> None:
        self._sync = sync
        self._descriptor = os.open(spool / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise JournalTakenError from None
        self._sequence, self.state = _last(self._descriptor)

    def close(self) -> None:
        """Close and unlock the file."""
        os.close(self._descriptor)

    def reserve(self) -> None:
        """Reserve room, so that reading can continue while the disk is full."""
        for slot in (0, 1):
            os.posix_fallocate(self._descriptor, slot * SLOT_SIZE, _RESERVED)

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state."""
        content = orjson.dumps(state)
        if len(content) > SLOT_SIZE - _HEAD.size:
            raise OSError(f"a journal entry of {len(content)} bytes is too large")
        sequence = self._sequence + 1
        data = _HEAD.pack(sequence, len(content), _checksum(sequence, content)) + content
        if os.pwrite(self._descriptor, data, sequence % 2 * SLOT_SIZE) < len(data):
            raise OSError("the journal could not be written completely")
        if self._sync:
            os.fdatasync(self._descriptor)
        self._sequence, self.state = sequence, dict(state)


def _checksum(sequence: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(sequence.to_bytes(8)))


def _last(descriptor: int) -> tuple[int, dict[str, Any]]:
    """Return the sequence number and state of the slot that was written last."""
    slots: list[tuple[int, dict[str, Any]]] = [(0, {})]
    for slot in (0, 1):
        head = os.pread(descriptor, _HEAD.size, slot * SLOT_SIZE)
        if len(head) < _HEAD.size:
            continue
        sequence, size, checksum = _HEAD.unpack(head)
        content = os.pread(descriptor, min(size, SLOT_SIZE), slot * SLOT_SIZE + _HEAD.size)
        if content and _checksum(sequence, content) == checksum:
            slots.append((sequence, orjson.loads(content)))
    return max(slots, key=lambda found: found[0])


def written(spool: Path, writer: str, marks: Marks) -> dict[str, int]:
    """Return, by queue, how many records this writer's segments hold behind the marks; raises OSError."""
    return {queue: _written(queues_directory(spool) / queue, writer, mark) for queue, mark in marks.items()}


def _written(directory: Path, writer: str, mark: tuple[int, int]) -> int:
    first, size = mark
    number_of_records = 0
    for name in segment_names(directory):
        found, number = writer_and_number(name)
        if found == writer and number >= first:
            start = size if number == first else 0
            items = read_segment(directory / name, start)
            number_of_records += sum(isinstance(item, Record) for item in items)
    return number_of_records


def segments_needed(spool: Path) -> Callable[[str, str], bool]:
    """Return whether a segment, by queue and name, has to stay even if it is delivered.

    It has while its batch may not be written completely: a successor counts the records in it.
    """
    needed: dict[tuple[str, str], int] = {}
    for batch in _read(spool).get("batches", []):
        needed |= {(queue, batch["writer"]): first for queue, (first, _) in batch["marks"].items()}

    def is_needed(queue: str, name: str) -> bool:
        writer, number = writer_and_number(name)
        first = needed.get((queue, writer))
        return first is not None and number >= first

    return is_needed


def _read(spool: Path) -> dict[str, Any]:
    try:
        descriptor = os.open(spool / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    try:
        return _last(descriptor)[1]
    finally:
        os.close(descriptor)
