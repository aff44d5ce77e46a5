"""What sources said last, kept between the runs of a daemon: an unchanged fingerprint saves the reading."""

from __future__ import annotations

from collections.abc import Sequence

from syncd.model import Principal
from syncd.sources.base import Source


class Readings:
    """Reads sources, and remembers the last reading of each that has a fingerprint.

    A source is told apart by its settings (sources are values), so one that is configured anew is
    read anew. Not for several threads at once: one run at a time reads.
    """

    def __init__(self) -> None:
        self._kept: dict[Source, tuple[str, tuple[Principal, ...]]] = {}

    def read(self, source: Source) -> Sequence[Principal]:
        """Return all principals of a source, from memory if its fingerprint is that of the last reading."""
        fingerprint = source.fingerprint()
        if fingerprint is None:
            return source.read()
        kept = self._kept.pop(source, None)
        if kept is None or kept[0] != fingerprint:
            # The fingerprint is older than what is read now: a change in between is seen the next time.
            kept = (fingerprint, tuple(source.read()))
        self._kept[source] = kept
        return kept[1]
