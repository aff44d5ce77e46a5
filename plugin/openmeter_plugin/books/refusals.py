"""Dead letters by the answer that they got: which answers mean the same, and queries of the groups.

An answer is kept as the metering API sent it, usually a problem document (RFC 9457). Two answers are of one
group if they come from the same destination with the same status, title and detail; words with a digit in
them (positions in the batch, ids, times) do not count.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from openmeter_plugin.books.models import (
    DeadLetter,
    DeadLetterEntry,
    DeadLetterGroup,
    DeadLetterGroups,
    DeadLetters,
    Replays,
    ReplayStatus,
)
from openmeter_plugin.books.read_models import reading, timestamp

MAX_GROUPS: Final = 200
_MEMBER: Final = re.compile(r'"(title|detail)":"((?:[^"\\]|\\.)*)')
_WITH_DIGIT: Final = re.compile(r"[\w:+-]*\d[\w:+-]*")


class Refusal(NamedTuple):
    """What an answer says; `title` is empty if the answer is no problem document."""

    title: str
    detail: str

    @property
    def text(self) -> str:
        """Return both in one line; Konnect's details begin with the title."""
        if self.detail.startswith(self.title):
            return self.detail
        return ": ".join(part for part in (self.title, self.detail) if part)


def refusal_of(answer: str) -> Refusal:
    """Return the title and detail of an answer, or all of it as the detail."""
    if not answer.startswith("{"):
        return Refusal("", answer)
    try:
        document = orjson.loads(answer)
    except orjson.JSONDecodeError:
        # Cut off, because it was too long.
        document = {name: _unescaped(text) for name, text in reversed(_MEMBER.findall(answer))}
    title, detail = (_text(document, name) for name in ("title", "detail")) if document else ("", "")
    if not detail:
        detail = "; ".join(_parameters(document.get("invalid_parameters")))
    return Refusal(title, detail) if title or detail else Refusal("", answer)


def _text(document: Any, name: str) -> str:
    found = document.get(name) if isinstance(document, dict) else None
    return " ".join(found.split()) if isinstance(found, str) else ""


def _unescaped(text: str) -> str:
    try:
        return str(orjson.loads(f'"{text}"'))
    except orjson.JSONDecodeError:
        return text


def _parameters(parameters: object) -> list[str]:
    """Return what an answer of v3 says of each invalid field."""
    listed = parameters if isinstance(parameters, list) else []
    found = [(_text(one, "field"), _text(one, "reason")) for one in listed if isinstance(one, dict)]
    return [": ".join(part for part in one if part) for one in found if any(one)]


@lru_cache(maxsize=1024)
def refusal_group(queue: str, status: int | None, answer: str) -> str:
    """Return the id of the group of a dead letter."""
    title, detail = refusal_of(answer)
    parts = [queue, status, *(_WITH_DIGIT.sub("#", text) for text in (title, detail))]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:16]


def with_groups(db: sqlite3.Connection) -> None:
    """Give a connection the SQL function `refusal_group`."""
    db.create_function("refusal_group", 3, refusal_group, deterministic=True)


def read_groups(spool: Path, *, limit: int = MAX_GROUPS) -> DeadLetterGroups:
    """Return the dead letters by their answer, the largest groups first; raises SpoolError."""
    with reading(spool) as db:
        rows = db.execute(
            # First by what is equal, in SQL: the function is called for each distinct answer only.
            "SELECT queue, status, coalesce(text, answer), number, marked, first, last, newest FROM ("
            "  SELECT queue, status, answer, answer_id, count(*) AS number, sum(replay != 0) AS marked,"
            "    min(at) AS first, max(at) AS last, max(id) AS newest"
            "  FROM dead_letters GROUP BY queue, status, answer_id, answer"
            ") LEFT JOIN answers a ON a.id = answer_id"
        ).fetchall()
    groups: dict[str, DeadLetterGroup] = {}
    for row in rows:
        group = _group(*row)
        known = groups.get(group.id)
        groups[group.id] = group if known is None else _joined(known, group)
    found = sorted(groups.values(), key=lambda group: (-group.dead_letters, group.id))
    return DeadLetterGroups(
        groups=found[:limit],
        further_groups=max(0, len(found) - limit),
        dead_letters=sum(group.dead_letters for group in found),
        to_be_replayed=sum(group.to_be_replayed for group in found),
        newest_id=max((group.newest_id for group in found), default=0),
    )


def _group(
    queue: str,
    status: int | None,
    answer: str,
    number: int,
    marked: int,
    first: float,
    last: float,
    newest: int,
) -> DeadLetterGroup:
    refusal = refusal_of(answer)
    return DeadLetterGroup(
        id=refusal_group(queue, status, answer),
        destination=queue,
        status=status,
        title=refusal.title,
        detail=refusal.detail,
        dead_letters=number,
        to_be_replayed=marked,
        first_died_at=timestamp(first),
        last_died_at=timestamp(last),
        newest_id=newest,
    )


def _joined(one: DeadLetterGroup, other: DeadLetterGroup) -> DeadLetterGroup:
    """Return two parts of one group as one, with the words of the newest dead letter."""
    newest = max(one, other, key=lambda group: group.newest_id)
    return newest.model_copy(
        update={
            "dead_letters": one.dead_letters + other.dead_letters,
            "to_be_replayed": one.to_be_replayed + other.to_be_replayed,
            "first_died_at": min(one.first_died_at, other.first_died_at),
            "last_died_at": max(one.last_died_at, other.last_died_at),
        }
    )


_LETTER: Final = (
    "SELECT d.id, queue, event, status, coalesce(text, answer), at, replay"
    " FROM dead_letters d LEFT JOIN answers a ON a.id = answer_id"
)


def read_dead_letters(
    spool: Path, *, after: int = 0, limit: int = 100, group: str | None = None
) -> DeadLetters:
    """Return a page of the dead letters after an id, of all or of one group; raises SpoolError."""
    with reading(spool) as db:
        with_groups(db)
        rows = db.execute(
            f"{_LETTER} WHERE d.id > ?"
            " AND (? IS NULL OR refusal_group(queue, status, coalesce(text, answer)) = ?)"
            " ORDER BY d.id LIMIT ?",
            (after, group, group, limit + 1),
        ).fetchall()
    entries = [DeadLetterEntry(**_fields(*row)) for row in rows[:limit]]
    return DeadLetters(dead_letters=entries, next=entries[-1].id if len(rows) > limit else None)


def read_dead_letter(spool: Path, number: int) -> DeadLetter | None:
    """Return a dead letter with its whole event, None if there is none with this id; raises SpoolError."""
    with reading(spool) as db:
        row = db.execute(f"{_LETTER} WHERE d.id = ?", (number,)).fetchone()
    return None if row is None else DeadLetter(**_fields(*row), event=orjson.loads(row[2]))


def _fields(
    number: int, queue: str, raw: bytes, status: int | None, answer: str, at: float, replay: int
) -> dict[str, Any]:
    event: dict[str, Any] = orjson.loads(raw)
    title, detail = refusal_of(answer)
    return {
        "id": number,
        "destination": queue,
        "event_id": str(event.get("id", "")),
        "type": str(event.get("type", "")),
        "subject": str(event.get("subject", "")),
        "time": str(event.get("time", "")),
        "status": status,
        "answer": answer,
        "title": title,
        "detail": detail,
        "group": refusal_group(queue, status, answer),
        "died_at": timestamp(at),
        "to_be_replayed": bool(replay),
    }


_REPLAY: Final = "SELECT id, asked, marked, delivered, refused FROM replays"


def read_replays(spool: Path, *, limit: int = 20) -> Replays:
    """Return the latest replays, latest first; raises SpoolError."""
    with reading(spool) as db:
        rows = db.execute(f"{_REPLAY} ORDER BY id DESC LIMIT ?", (limit,)).fetchall()
    return Replays(replays=[_replay(*row) for row in rows])


def read_replay(spool: Path, number: int) -> ReplayStatus | None:
    """Return what became of a replay, None if there is none with this id; raises SpoolError."""
    with reading(spool) as db:
        row = db.execute(f"{_REPLAY} WHERE id = ?", (number,)).fetchone()
    return None if row is None else _replay(*row)


def _replay(number: int, asked: float, marked: int, delivered: int, refused: int) -> ReplayStatus:
    return ReplayStatus(
        id=number,
        marked=marked,
        delivered=delivered,
        refused=refused,
        waiting=marked - delivered - refused,
        asked_at=timestamp(asked),
    )
