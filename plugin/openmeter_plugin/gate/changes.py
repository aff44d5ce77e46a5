"""Numbered changes: what Kong must be sent again, from any number on.

Each name has one place, that of its newest change. A full state of 400,000 names is sent in 200 slices, so
the place of a number is found by bisection, not by walking there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Final, Generic, TypeVar

_Name = TypeVar("_Name", bound=Hashable)
_SLACK: Final = 1_000
"""Outdated places that are kept in any case; beyond it, as many as there are names."""


class Changes(Generic[_Name]):
    """Names by the number of their newest change."""

    def __init__(self) -> None:
        self.number = 0
        self.forgotten_up_to = 0
        """Changes up to this one may lack what was forgotten; older numbers need the full state."""
        self._numbers: dict[_Name, int] = {}
        self._log: list[tuple[int, _Name]] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def note(self, name: _Name) -> None:
        """Note a change of a name."""
        self.number += 1
        self._numbers[name] = self.number
        self._log.append((self.number, name))
        if len(self._log) > 2 * len(self._numbers) + _SLACK:
            self._log = [(number, name) for number, name in self._log if self._numbers.get(name) == number]

    def since(self, number: int, limit: int | None = None) -> list[tuple[int, _Name]]:
        """Return up to `limit` of what changed after a number, oldest first."""
        start = bisect_right(self._log, number, key=lambda change: change[0])
        places = (self._log[index] for index in range(start, len(self._log)))
        return list(islice((it for it in places if self._numbers.get(it[1]) == it[0]), limit))

    def forget_oldest(self, surplus: int, is_live: Callable[[_Name], bool]) -> None:
        """Forget the oldest changes of names that are not live any more."""
        for number, name in self.since(0):
            if surplus <= 0:
                return
            if not is_live(name):
                del self._numbers[name]
                self.forgotten_up_to = max(number, self.forgotten_up_to)
                surplus -= 1
