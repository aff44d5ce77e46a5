"""The kept usage in a real database: what was written comes back, to the event, for any range."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from syncd.metering.base import GroupedValue
from syncd.state.database import State
from syncd.state.location import StateLocation
from syncd.usage.days import Days
from syncd.usage.store import LateUsage, Refresh, UsageStore, same

METER = "kong_api_requests"
NOW = datetime(2026, 11, 29, 8, tzinfo=UTC)
OCTOBER = Days(date(2026, 10, 1), date(2026, 11, 1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UsageStore]:
    with State(StateLocation(tmp_path)) as state:
        found = UsageStore(state)
        found.keep_meter(METER, ["route_name"])
        yield found


def day(text: str) -> date:
    return date.fromisoformat(text)


def row(subject: str, value: float, route: str = "") -> GroupedValue:
    return GroupedValue(subject, (route,), value)


def put(store: UsageStore, when: str, *rows: GroupedValue, late: bool = False, at: datetime = NOW) -> None:
    store.replace_day(METER, day(when), rows, sum(r.value for r in rows), at, late=late)


def test_a_day_comes_back_by_day_subject_and_dimension(store: UsageStore) -> None:
    put(store, "2026-10-31", row("a", 3, "orders"), row("a", 4, "search"), row("b", 5))
    put(store, "2026-11-01", row("a", 10, "orders"))
    both = Days(day("2026-10-31"), day("2026-11-02"))
    assert store.by_day(METER, both) == [12, 10]
    assert store.by_subject(METER, both) == {"a": 17, "b": 5}
    assert store.by_subject(METER, OCTOBER) == {"a": 7, "b": 5}
    assert store.by_dimension(METER, both, "route_name") == {"orders": 13, "search": 4, "": 5}
    assert sorted(store.by_labels(METER, both)) == [
        ("a", (("route_name", "orders"),), 3),
        ("a", (("route_name", "orders"),), 10),
        ("a", (("route_name", "search"),), 4),
        ("b", (("route_name", ""),), 5),
    ]


def test_figures_of_some_subjects_are_theirs_alone(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1, "x"), row("b", 2, "x"), row("c", 4, "y"))
    assert sum(store.by_day(METER, OCTOBER, ["a", "c"])) == 5
    assert store.by_subject(METER, OCTOBER, ["c", "unknown"]) == {"c": 4}
    assert store.by_dimension(METER, OCTOBER, "route_name", {"a", "c"}) == {"x": 1, "y": 4}
    assert store.by_day(METER, OCTOBER, []) == [0.0] * 31
    assert store.by_subject(METER, OCTOBER, [str(number) for number in range(2500)] + ["b"]) == {"b": 2}


def test_a_day_is_replaced_whole(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1), row("b", 2))
    put(store, "2026-10-06", row("a", 7))
    put(store, "2026-10-05", row("b", 3))
    assert store.by_subject(METER, OCTOBER) == {"a": 7, "b": 3}
    assert store.days(METER)[day("2026-10-05")].total == 3


def test_late_usage_is_noted_by_subject_with_what_it_changed(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1, "x"), row("a", 1, "y"), row("b", 2))
    later = NOW + timedelta(hours=1)
    put(store, "2026-10-05", row("a", 5), row("c", 4), late=True, at=later)
    found = {late.subject: late for late in store.late(OCTOBER)}
    assert {subject: late.value for subject, late in found.items()} == {"a": 3, "b": -2, "c": 4}
    assert found["a"] == LateUsage(METER, day("2026-10-05"), "a", later, 3)
    assert store.late(Days(day("2026-11-01"), day("2026-12-01"))) == ()


def test_usage_within_the_first_days_is_not_late(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1))
    put(store, "2026-10-05", row("a", 2))
    assert store.late(OCTOBER) == ()


def test_the_last_day_with_usage_of_a_subject_is_known(store: UsageStore) -> None:
    for when in ("2026-09-30", "2026-10-05", "2026-11-02"):
        put(store, when, row("a", 1), row("b", 0))
    put(store, "2026-10-31", row("c", 1, "x"))
    put(store, "2026-10-05", row("c", 1, "y"))
    days = {"a": day("2026-11-02"), "c": day("2026-10-31")}
    assert store.last_days(METER, ["a", "b", "c", "d"]) == days
    put(store, "2026-11-02")
    assert store.last_days(METER, ["a"]) == {"a": day("2026-09-30")}


def test_usage_before_a_day_is_known_by_subject(store: UsageStore) -> None:
    put(store, "2026-09-30", row("early", 1), row("none", 0))
    put(store, "2026-10-04", row("eve", 1))
    put(store, "2026-10-05", row("same", 1), row("early", 1))
    wanted = ["early", "eve", "same", "none", "unknown"]
    assert store.used_before(METER, day("2026-10-05"), wanted) == {"early", "eve"}
    assert store.used_before(METER, day("2026-09-30"), wanted) == frozenset()


def test_of_a_day_that_changed_only_what_differs_is_written(store: UsageStore) -> None:
    rows = [row(str(number), 0.1 + number) for number in range(50)]
    put(store, "2026-10-05", *rows)
    written: list[int] = []

    def count(*called: object) -> None:
        statement, parameters, many = called[2], called[3], called[5]
        if "usage_values" in str(statement) and "INSERT" in str(statement):
            written.append(len(parameters) if many else 1)  # type: ignore[arg-type]

    engine = store._state._engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        again = [one._replace(value=one.value + 1e-13) for one in rows[1:]]
        put(store, "2026-10-05", *again, row("late", 7), late=True)
    finally:
        event.remove(engine, "before_cursor_execute", count)
    assert sum(written) == 2, "the subject that is gone and the new one"
    assert {late.subject: late.value for late in store.late(OCTOBER)} == {"0": -0.1, "late": 7}
    assert "0" not in store.by_subject(METER, OCTOBER)


def test_subjects_that_no_database_holds_are_neither_lost_nor_late(store: UsageStore) -> None:
    names = ("a\x00", "a\ud800")
    put(store, "2026-10-05", *(row(name, 2) for name in names))
    assert store.by_subject(METER, OCTOBER) == {"a\ufffd": 4}
    put(store, "2026-10-05", *(row(name, 2) for name in names), late=True)
    assert (store.by_subject(METER, OCTOBER), store.late(OCTOBER)) == ({"a\ufffd": 4}, ())


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (5e12, 5e12 + 1, False),
        (0.1 + 0.2, 0.3, True),
        (1e-6, 2e-6, False),
        (0, 1e-9, False),
        (3.9999999999999996, 4, True),
        (2.0**60, 2.0**60 + 1024, True),
    ],
)
def test_one_event_more_is_other_usage_and_rounding_is_none(one: float, other: float, expected: bool) -> None:
    assert same(one, other) is same(other, one) is expected


def test_other_dimensions_begin_anew_and_the_same_ones_keep_all(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1))
    store.keep_meter(METER, ["route_name"])
    assert store.by_subject(METER, OCTOBER) == {"a": 1}
    store.keep_meter(METER, ["route_name", "status"])
    assert store.by_subject(METER, OCTOBER) == {}
    assert store.days(METER) == {}


def test_a_meter_that_is_not_kept_any_longer_is_forgotten(store: UsageStore) -> None:
    put(store, "2026-10-05", row("a", 1))
    store.keep_meter("other", [])
    store.forget_others(["other"])
    assert [kept.meter for kept in store.meters()] == ["other"]
    assert store.by_subject(METER, OCTOBER) == {}


def test_old_months_are_forgotten_whole(store: UsageStore) -> None:
    for when in ("2026-08-31", "2026-09-01", "2026-10-05"):
        put(store, when, row("a", 1))
    store.forget_before(day("2026-09-20"))
    assert sorted(store.days(METER)) == [day("2026-09-01"), day("2026-10-05")]
    assert store.by_subject(METER, Days(day("2026-08-01"), day("2026-11-01"))) == {"a": 2}


def test_refreshes_and_the_state_of_meters_are_kept(store: UsageStore) -> None:
    assert (store.last_refresh(), store.revision()) == (None, 0)
    refresh = Refresh(NOW, NOW + timedelta(seconds=3), 5, 2, None)
    store.note_refresh(refresh)
    store.note_complete(METER, day("2026-09-01"), NOW, None)
    store.note_problem(METER, "HTTP 500")
    (meter,) = store.meters()
    assert (store.last_refresh(), store.revision()) == (refresh, 1)
    assert (meter.since, meter.refreshed_at, meter.problem) == (day("2026-09-01"), NOW, "HTTP 500")


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    with State(StateLocation(tmp_path)) as state:
        UsageStore(state).keep_meter(METER, ["route_name"])
        put(UsageStore(state), "2026-10-05", row("a", 1))
    with State(StateLocation(tmp_path)) as state:
        assert UsageStore(state).by_subject(METER, OCTOBER) == {"a": 1}


_WRITES = st.lists(
    st.tuples(
        st.integers(0, 70),
        st.dictionaries(
            st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", ""])), st.integers(0, 2**50)
        ),
    ),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(_WRITES, st.integers(0, 69), st.integers(1, 71))
def test_any_range_adds_up_to_the_days_last_written(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[int, dict[tuple[str, str], int]]],
    start: int,
    end: int,
) -> None:
    begin, model = date(2026, 9, 15), dict[date, dict[tuple[str, str], int]]()
    days = Days(begin + timedelta(days=start), begin + timedelta(days=max(end, start + 1)))
    with State(StateLocation(tmp_path_factory.mktemp("state"))) as state:
        store = UsageStore(state)
        store.keep_meter(METER, ["route_name"])
        for offset, values in writes:
            when = begin + timedelta(days=offset)
            model[when] = values
            put(store, when.isoformat(), *(row(s, v, r) for (s, r), v in values.items()))
        shown = [model.get(when, {}) for when in days]
        by_subject = {
            subject: total
            for subject in "abc"
            if (total := sum(v for values in shown for (s, _), v in values.items() if s == subject))
        }
        assert store.by_subject(METER, days) == by_subject
        assert store.by_day(METER, days) == [sum(values.values()) for values in shown]
        assert sum(store.by_dimension(METER, days, "route_name").values()) == sum(by_subject.values())
        assert sum(value for _, _, value in store.by_labels(METER, days)) == sum(by_subject.values())
