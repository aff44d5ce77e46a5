"""Numbers of the reader, in memory that it shares with the process that shows them as metrics."""

from __future__ import annotations

import mmap
import struct
from typing import Final, NamedTuple

_VALUES: Final = struct.Struct("<8d")


class ReaderState(NamedTuple):
    """What the reader last published."""

    requests: float = 0.0
    """Requests read since the supervisor started."""
    lag_bytes: float = 0.0
    """Bytes in the folder that are not read yet."""
    lag_seconds: float = 0.0
    """For how long the oldest of them has waited."""
    waiting: float = 0.0
    """Segments that wait for the configuration that their next request names."""
    unrecognised: float = 0.0
    """Files named like a segment that hold none, or none of a version that this one reads."""
    kept: float = 0.0
    """Segments that are read and could not be removed."""
    readable: float = 0.0
    """1 while the folder can be read."""
    segments: float = 0.0
    """Segments in the folder that are not read to their end."""


class ReaderStats:
    """The shared memory; created before the forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _VALUES.size)

    def publish(self, state: ReaderState) -> None:
        """Replace the numbers."""
        _VALUES.pack_into(self._memory, 0, *state)

    def read(self) -> ReaderState:
        """Return the numbers."""
        return ReaderState(*_VALUES.unpack_from(self._memory))
