"""The kept usage: reads and writes the tables of usage in the state.

`UsageStore` is what pages, the month-end close and notifications read; ranges are `Days`, in UTC. A day is
written whole in one transaction, so readers never see a part of one. Whose subjects they are is in the
directory (`syncd.customers.directory`), not here: usage keeps its subject, whichever customer has it later.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from syncd.metering.base import GroupedValue
from syncd.state.database import State, upserting
from syncd.state.tables import (
    storable,
    usage_days,
    usage_late,
    usage_meters,
    usage_refreshes,
    usage_values,
)
from syncd.usage.days import Days, month_of
from syncd.usage.estimates import Labels

_AT_ONCE: Final = 1000
"""Subjects of one query: databases limit the parameters of a statement."""
_ROWS_AT_ONCE: Final = 5000
_EXACT: Final = 2.0**53
"""Below it, a float holds each whole number."""
_KEPT_REFRESHES: Final = 200


@dataclass(frozen=True, slots=True)
class KeptMeter:
    """A meter whose usage is kept. At `refreshed_at`, all days from `since` on were as the API had them."""

    meter: str
    dimensions: tuple[str, ...]
    since: date | None
    refreshed_at: datetime | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class KeptDay:
    """A fetched day: what its rows add up to, and what the metering API said that they should."""

    total: float
    reported: float
    fetched_at: datetime


@dataclass(frozen=True, slots=True)
class LateUsage:
    """Usage of a day that was only seen when the day had long been fetched; negative if it became less."""

    meter: str
    day: date
    subject: str
    seen_at: datetime
    value: float


@dataclass(frozen=True, slots=True)
class Refresh:
    """A refresh: the days of meters that it wrote, and those left for the next one."""

    started_at: datetime
    finished_at: datetime
    days: int
    remaining: int
    problem: str | None = None


class LabelledValue(NamedTuple):
    """The value of a meter for one subject and these values of its dimensions."""

    subject: str
    labels: Labels
    value: float


def same(one: float, other: float) -> bool:
    """Return whether two values of a meter are the same usage.

    Sums of fractions differ in their last digits from one request to the next; whole numbers never do.
    """
    whole = float(one).is_integer() and float(other).is_integer() and max(abs(one), abs(other)) < _EXACT
    return one == other or (not whole and math.isclose(one, other, rel_tol=1e-9))


class UsageStore:
    """The kept usage; thread-safe. All methods raise StateError."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Reading

    def meters(self) -> tuple[KeptMeter, ...]:
        """Return the meters, sorted by key."""
        with self._state.reading() as connection:
            rows = connection.execute(select(usage_meters).order_by(usage_meters.c.meter))
            return tuple(map(_kept_meter, rows))

    def meter(self, key: str) -> KeptMeter:
        """Return a meter that is kept."""
        with self._state.reading() as connection:
            statement = select(usage_meters).where(usage_meters.c.meter == key)
            return _kept_meter(connection.execute(statement).one())

    def last_refresh(self) -> Refresh | None:
        """Return the latest refresh."""
        statement = select(usage_refreshes).order_by(usage_refreshes.c.number.desc()).limit(1)
        with self._state.reading() as connection:
            row = connection.execute(statement).first()
        if row is None:
            return None
        started, finished = datetime.fromisoformat(row.started_at), datetime.fromisoformat(row.finished_at)
        return Refresh(started, finished, row.days, row.remaining, row.problem)

    def revision(self) -> int:
        """Return a number that grows with each refresh, for caches."""
        with self._state.reading() as connection:
            return connection.execute(select(func.max(usage_refreshes.c.number))).scalar() or 0

    def days(self, meter: str) -> dict[date, KeptDay]:
        """Return the fetched days of a meter."""
        statement = select(usage_days).where(usage_days.c.meter == meter)
        with self._state.reading() as connection:
            return {
                date.fromisoformat(row.day): KeptDay(
                    row.total, row.reported, datetime.fromisoformat(row.fetched_at)
                )
                for row in connection.execute(statement)
            }

    def by_day(self, meter: str, days: Days, subjects: Collection[str] | None = None) -> list[float]:
        """Return the value of each day of the range, of all subjects or of these."""
        if subjects is None:
            statement = select(usage_days.c.day, usage_days.c.total).where(
                usage_days.c.meter == meter,
                usage_days.c.day >= days.since.isoformat(),
                usage_days.c.day < days.until.isoformat(),
            )
            with self._state.reading() as connection:
                totals = {row.day: row.total for row in connection.execute(statement)}
            return [totals.get(day.isoformat(), 0.0) for day in days]
        values: list[float] = []
        with self._state.reading() as connection:
            for part in days.by_month():
                sums = [func.sum(_day(day)) for day in part]
                found = [0.0] * len(part)
                for condition in _of(meter, part, subjects):
                    row = connection.execute(select(*sums).where(condition)).one()
                    found = [before + (value or 0) for before, value in zip(found, row, strict=True)]
                values += found
        return values

    def by_subject(self, meter: str, days: Days, subjects: Collection[str] | None = None) -> dict[str, float]:
        """Return the value of the range for each subject that has one, of all or of these."""
        found: dict[str, float] = {}
        for subject, amount in self._grouped(usage_values.c.subject, meter, days, subjects):
            found[subject] = found.get(subject, 0.0) + amount
        return found

    def by_dimension(
        self, meter: str, days: Days, dimension: str, subjects: Collection[str] | None = None
    ) -> dict[str, float]:
        """Return the value of the range for each value of a dimension; an empty text is its absence."""
        found: dict[str, float] = defaultdict(float)
        for labels, amount in self._grouped(usage_values.c.labels, meter, days, subjects):
            found[dict(_labels(labels)).get(dimension, "")] += amount
        return dict(found)

    def _grouped(
        self, column: Column[str], meter: str, days: Days, subjects: Collection[str] | None
    ) -> Iterator[tuple[str, float]]:
        """Return the value of each month of the range for each value of a column."""
        with self._state.reading() as connection:
            for part in days.by_month():
                for condition in _of(meter, part, subjects):
                    rows = select(column, func.sum(_sum_of(part))).where(condition).group_by(column)
                    for value, amount in connection.execute(rows):
                        if amount:
                            yield value, amount

    def by_labels(
        self, meter: str, days: Days, subjects: Collection[str] | None = None
    ) -> Iterator[LabelledValue]:
        """Return the value of the range for each subject and values of dimensions, month by month.

        A combination comes once for each month of the range: prices see one month at a time.
        """
        with self._state.reading() as connection:
            for part in days.by_month():
                value = _sum_of(part).label("value")
                for condition in _of(meter, part, subjects):
                    columns = select(usage_values.c.subject, usage_values.c.labels, value).where(condition)
                    for subject, labels, amount in connection.execute(_streamed(columns)):
                        if amount:
                            yield LabelledValue(subject, _labels(labels), amount)

    def used_before(self, meter: str, day: date, subjects: Collection[str]) -> frozenset[str]:
        """Return those of these subjects that have kept usage before a day."""
        left = set(subjects)
        with self._state.reading() as connection:
            for month in _months(connection, meter, usage_days.c.day < day.isoformat()):
                used = or_(*(_day(one) != 0 for one in month if one < day))
                for condition in _of(meter, month, left):
                    found = select(usage_values.c.subject).where(condition, used)
                    left.difference_update(connection.execute(found).scalars().all())
        return frozenset(subjects) - left

    def last_days(self, meter: str, subjects: Collection[str]) -> dict[str, date]:
        """Return the last kept day with usage, for those of these subjects that have any."""
        found: dict[str, date] = {}
        columns = [usage_values.c[f"d{number}"] for number in range(31, 0, -1)]
        with self._state.reading() as connection:
            for month in _months(connection, meter):
                for condition in _of(meter, month, set(subjects) - found.keys()):
                    rows = connection.execute(select(usage_values.c.subject, *columns).where(condition))
                    for subject, *values in rows:
                        last = next((31 - place for place, value in enumerate(values) if value), None)
                        if last is not None:
                            day = month.since.replace(day=last)
                            found[subject] = max(day, found.get(subject, day))
        return found

    def late(self, days: Days) -> tuple[LateUsage, ...]:
        """Return the late usage of the days of a range, in the order in which it was seen."""
        statement = (
            select(usage_late)
            .where(
                usage_late.c.day >= days.since.isoformat(),
                usage_late.c.day < days.until.isoformat(),
            )
            .order_by(usage_late.c.seen_at, usage_late.c.day, usage_late.c.meter, usage_late.c.subject)
        )
        with self._state.reading() as connection:
            return tuple(
                LateUsage(
                    row.meter,
                    date.fromisoformat(row.day),
                    row.subject,
                    datetime.fromisoformat(row.seen_at),
                    row.value,
                )
                for row in connection.execute(statement)
            )

    # Writing

    def keep_meter(self, meter: str, dimensions: Sequence[str]) -> None:
        """Note that a meter is kept with these dimensions; with others than before, it starts empty."""
        wanted = json.dumps(list(dimensions))
        with self._state.writing() as connection:
            row = connection.execute(select(usage_meters).where(usage_meters.c.meter == meter)).first()
            if row is not None and row.dimensions == wanted:
                return
            _forget(connection, meter)
            connection.execute(insert(usage_meters).values(meter=meter, dimensions=wanted))

    def forget_others(self, meters: Collection[str]) -> None:
        """Delete the usage of meters that are not kept any longer."""
        for kept in self.meters():
            if kept.meter not in meters:
                with self._state.writing() as connection:
                    _forget(connection, kept.meter)

    def replace_day(
        self,
        meter: str,
        day: date,
        rows: Sequence[GroupedValue],
        reported: float,
        fetched_at: datetime,
        *,
        late: bool,
    ) -> float:
        """Replace a day of a meter, and note what differs from before as late; returns the day's total.

        Only values that differ are written: a late event of 30,000 subjects' day writes one row.
        """
        total = sum(row.value for row in rows)
        with self._state.writing() as connection:
            dimensions = json.loads(
                connection.execute(
                    select(usage_meters.c.dimensions).where(usage_meters.c.meter == meter)
                ).scalar_one()
            )
            differences = _write_day(connection, meter, day, dimensions, rows)
            if late:
                _note_late(connection, meter, day, differences, fetched_at)
            kept = {"total": total, "reported": reported, "fetched_at": fetched_at.isoformat()}
            _upsert(connection, usage_days, {"meter": meter, "day": day.isoformat()}, kept)
        return total

    def note_complete(self, meter: str, since: date, refreshed_at: datetime, problem: str | None) -> None:
        """Note that all days of a meter from `since` on are as the metering API has them."""
        self._note(meter, since=since.isoformat(), refreshed_at=refreshed_at.isoformat(), problem=problem)

    def note_problem(self, meter: str, problem: str) -> None:
        """Note why a meter could not be refreshed."""
        self._note(meter, problem=problem)

    def note_missing(self, meter: str, problem: str) -> None:
        """Note that a meter does not exist now, and keep what is kept of it."""
        with self._state.writing() as connection:
            new = upserting(connection, usage_meters).values(meter=meter, dimensions="[]")
            connection.execute(new.on_conflict_do_nothing())
        self.note_problem(meter, problem)

    def _note(self, meter: str, **values: str | None) -> None:
        with self._state.writing() as connection:
            connection.execute(update(usage_meters).where(usage_meters.c.meter == meter).values(values))

    def forget_before(self, day: date) -> None:
        """Delete usage before the month of a day, and late usage of these days."""
        first = day.replace(day=1).isoformat()
        with self._state.writing() as connection:
            connection.execute(delete(usage_values).where(usage_values.c.month < _month(day)))
            connection.execute(delete(usage_days).where(usage_days.c.day < first))
            connection.execute(delete(usage_late).where(usage_late.c.day < first))

    def note_refresh(self, refresh: Refresh) -> None:
        """Record a refresh."""
        with self._state.writing() as connection:
            values = {
                "started_at": refresh.started_at.isoformat(),
                "finished_at": refresh.finished_at.isoformat(),
                "days": refresh.days,
                "remaining": refresh.remaining,
                "problem": refresh.problem,
            }
            made = connection.execute(insert(usage_refreshes).values(values))
            newest = made.inserted_primary_key[0] if made.inserted_primary_key else 0
            old = usage_refreshes.c.number <= newest - _KEPT_REFRESHES
            connection.execute(delete(usage_refreshes).where(old))


def _of(meter: str, part: Days, subjects: Collection[str] | None) -> Iterator[ColumnElement[bool]]:
    """Return the conditions for the rows of a part of one month; several for many subjects."""
    condition = and_(usage_values.c.meter == meter, usage_values.c.month == _month(part.since))
    if subjects is None:
        yield condition
        return
    for chunk in _chunks(subjects):
        yield and_(condition, usage_values.c.subject.in_(chunk))


def _months(connection: Connection, meter: str, *conditions: ColumnElement[bool]) -> list[Days]:
    """Return the calendar months with fetched days of a meter, the latest first."""
    days = connection.execute(select(usage_days.c.day).where(usage_days.c.meter == meter, *conditions))
    return sorted({month_of(date.fromisoformat(day)) for day in days.scalars()}, reverse=True)


def _chunks(subjects: Collection[str]) -> Iterator[list[str]]:
    listed = sorted(subjects)
    return (listed[start : start + _AT_ONCE] for start in range(0, len(listed), _AT_ONCE))


def _day(day: date) -> Column[float]:
    return usage_values.c[f"d{day.day}"]


def _sum_of(part: Days) -> ColumnElement[float]:
    first, *others = (_day(day) for day in part)
    found: ColumnElement[float] = first
    for other in others:
        found = found + other
    return found


def _month(day: date) -> int:
    return day.year * 100 + day.month


def _streamed(statement: Select[Any]) -> Select[Any]:
    """Return a statement whose rows are read in parts: there may be a hundred thousand."""
    return statement.execution_options(yield_per=_ROWS_AT_ONCE)


def _text(labels: Iterable[tuple[str, str]]) -> str:
    return json.dumps(dict(sorted(labels)), ensure_ascii=False)


@lru_cache(maxsize=50_000)
def _labels(text: str) -> Labels:
    return tuple(sorted(json.loads(text).items()))


def _kept_meter(row: Row[Any]) -> KeptMeter:
    return KeptMeter(
        row.meter,
        tuple(json.loads(row.dimensions)),
        date.fromisoformat(row.since) if row.since else None,
        datetime.fromisoformat(row.refreshed_at) if row.refreshed_at else None,
        row.problem,
    )


def _forget(connection: Connection, meter: str) -> None:
    for table in (usage_values, usage_days, usage_late, usage_meters):
        connection.execute(delete(table).where(table.c.meter == meter))


def _upsert(connection: Connection, table: Any, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    statement = upserting(connection, table).values({**key, **values})
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=values))


def _write_day(
    connection: Connection,
    meter: str,
    day: date,
    dimensions: Sequence[str],
    rows: Iterable[GroupedValue],
) -> dict[str, float]:
    """Write the values of a day that differ from the kept ones; returns by how much, by subject."""
    column, month = _day(day), _month(day)
    kept_rows = select(usage_values.c.subject, usage_values.c.labels, column).where(
        usage_values.c.meter == meter, usage_values.c.month == month, column != 0
    )
    kept = {(subject, labels): value for subject, labels, value in connection.execute(kept_rows)}
    texts: dict[tuple[str, ...], str] = {}
    now: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        if row.labels not in texts:
            texts[row.labels] = storable(_text(zip(dimensions, row.labels, strict=True)))
        now[(storable(row.subject), texts[row.labels])] += row.value
    changed = [key for key, value in now.items() if not same(value, kept.get(key, 0.0))]
    changed += [key for key in kept if key not in now]
    statement = upserting(connection, usage_values)
    statement = statement.on_conflict_do_update(
        index_elements=["meter", "month", "subject", "labels"],
        set_={column.name: statement.excluded[column.name]},
    )
    differences: dict[str, float] = defaultdict(float)
    # In the order of the key, and some at a time: a day may have a hundred thousand rows.
    changed.sort()
    for start in range(0, len(changed), _ROWS_AT_ONCE):
        some = changed[start : start + _ROWS_AT_ONCE]
        for key in some:
            differences[key[0]] += now.get(key, 0.0) - kept.get(key, 0.0)
        connection.execute(
            statement,
            [
                {
                    "meter": meter,
                    "month": month,
                    "subject": subject,
                    "labels": labels,
                    column.name: now.get((subject, labels), 0.0),
                }
                for subject, labels in some
            ],
        )
    return differences


def _note_late(
    connection: Connection,
    meter: str,
    day: date,
    differences: Mapping[str, float],
    seen_at: datetime,
) -> None:
    """Record by how much the usage of each subject differs from what was kept."""
    changed = [
        {
            "meter": meter,
            "day": day.isoformat(),
            "subject": subject,
            "seen_at": seen_at.isoformat(),
            "value": value,
        }
        for subject, value in differences.items()
        if value
    ]
    if changed:
        connection.execute(insert(usage_late), changed)
