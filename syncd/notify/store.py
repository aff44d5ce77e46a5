"""The store of what was sent: each condition once, across restarts of the daemon."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import delete, select

from syncd.config.sections import Topic
from syncd.notify.conditions import Condition, Key
from syncd.state.database import State, upserting
from syncd.state.tables import notices

_SUMMARY = "summary"


@dataclass(frozen=True, slots=True)
class SentNotice:
    """A condition that was sent and still holds."""

    topic: str
    sent_at: str
    text: str


class Notices:
    """What was sent and still holds; everything raises StateError."""

    def __init__(self, state: State) -> None:
        self._state = state

    def sent(self) -> dict[Key, int]:
        """Return the figures of what was sent and still holds."""
        query = select(notices.c.topic, notices.c.key, notices.c.figure).where(notices.c.topic != _SUMMARY)
        with self._state.reading() as connection:
            rows = connection.execute(query).all()
        return {(cast("Topic", topic), key): figure for topic, key, figure in rows}

    def holding(self) -> list[SentNotice]:
        """Return what was sent and still holds, oldest first."""
        query = select(notices.c.topic, notices.c.sent_at, notices.c.text).where(notices.c.topic != _SUMMARY)
        with self._state.reading() as connection:
            return [SentNotice(*row) for row in connection.execute(query.order_by(notices.c.sent_at))]

    def keep(self, conditions: Iterable[Condition], at: datetime) -> None:
        """Note that these were sent."""
        self._keep([(one.topic, one.key, one.figure, one.text) for one in conditions], at)

    def end(self, keys: Iterable[Key]) -> None:
        """Forget what no longer holds, so that it is sent again when it comes back."""
        with self._state.writing() as connection:
            for topic, key in keys:
                statement = delete(notices).where(notices.c.topic == topic, notices.c.key == key)
                connection.execute(statement)

    def last_summary(self) -> datetime | None:
        """Return when the latest summary was sent, or the first time that one was looked for."""
        query = select(notices.c.sent_at).where(notices.c.topic == _SUMMARY)
        with self._state.reading() as connection:
            found = connection.execute(query).scalar()
        return datetime.fromisoformat(found) if found else None

    def keep_summary(self, at: datetime) -> None:
        """Note that a summary was sent."""
        self._keep([(_SUMMARY, _SUMMARY, 1, "")], at)

    def _keep(self, rows: Iterable[tuple[str, str, int, str]], at: datetime) -> None:
        with self._state.writing() as connection:
            for topic, key, figure, text in rows:
                values = {"sent_at": at.isoformat(), "figure": figure, "text": text}
                statement = upserting(connection, notices).values(topic=topic, key=key, **values)
                connection.execute(
                    statement.on_conflict_do_update(index_elements=["topic", "key"], set_=values)
                )
