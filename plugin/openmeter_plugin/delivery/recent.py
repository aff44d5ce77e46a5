"""The ids of the last requests, by which one that Kong hands over a second time is known."""

from __future__ import annotations

from collections.abc import Iterable, KeysView


class RecentIds:
    """Remembers so many ids at most, and half as many at least.

    In two halves, of which the older is forgotten as a whole: forgetting one by one would cost more than
    remembering.
    """

    def __init__(self, most: int) -> None:
        self._half = max(1, most // 2)
        self._younger: dict[bytes, None] = {}
        self._older: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def __contains__(self, event_id: bytes) -> bool:
        return event_id in self._younger or event_id in self._older

    def has_none_of(self, ids: KeysView[bytes]) -> bool:
        """Tell whether none of the ids is remembered."""
        return ids.isdisjoint(self._younger.keys()) and ids.isdisjoint(self._older.keys())

    def remember(self, ids: Iterable[bytes]) -> None:
        """Remember ids, the last of them in any case."""
        new = list(ids)[-self._half :]
        if len(self._younger) + len(new) > self._half:
            self._older, self._younger = self._younger, {}
        self._younger.update(dict.fromkeys(new))
