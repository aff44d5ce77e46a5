"""The schedule: who is asked about when, within the budget of calls."""

from __future__ import annotations

from openmeter_plugin.gate.schedule import Balance, Pace, Query, Schedule


def asked(calls: list[Query | Balance]) -> set[str]:
    return {subject for call in calls if isinstance(call, Query) for subject in call.subjects}


def calls(schedule: Schedule, now: float) -> list[Query | Balance]:
    """Make the calls that are due, each with one request."""
    found = schedule.calls(now)
    for _ in found:
        schedule.spend()
    return found


def started(**pace: float) -> Schedule:
    schedule = Schedule(Pace(**pace))  # type: ignore[arg-type]
    schedule.calls(0.0)  # the budget begins to fill
    return schedule


def test_a_subject_never_seen_is_asked_about_at_once_and_with_others_in_one_query() -> None:
    schedule = started()
    for number in range(250):
        schedule.seen(f"s{number}", 1.0)
    found = calls(schedule, 1.0)
    assert [len(call.subjects) for call in found if isinstance(call, Query)] == [100, 100, 50]


def test_an_active_subject_is_asked_about_again_after_refresh_and_an_idle_one_later() -> None:
    schedule = started(refresh=1.5, active_for=60, idle_refresh=60)
    schedule.seen("a", 1.0)
    schedule.known(asked(calls(schedule, 1.0)), 1.0)
    assert asked(calls(schedule, 2.4)) == set()
    assert asked(calls(schedule, 2.6)) == {"a"}
    schedule.known({"a"}, 62.0)  # no request for more than a minute
    assert asked(calls(schedule, 64.0)) == set()
    schedule.seen("a", 65.0)  # back again
    assert asked(calls(schedule, 65.0)) == {"a"}
    schedule.known({"a"}, 65.0)
    assert asked(calls(schedule, 123.0)) == {"a"}
    assert asked(calls(schedule, 123.0)) == set()  # once, although it was due twice


def test_a_balance_near_its_end_is_asked_for_more_often() -> None:
    schedule = started()
    schedule.balance_read("far", 1.0, None)
    schedule.balance_read("near", 1.0, 5.0)
    schedule.balance_read("at-the-end", 1.0, 0.1)
    due: dict[str, float] = {}
    for tick in range(10, 400):
        for call in calls(schedule, tick / 10):
            if isinstance(call, Balance):
                due.setdefault(call.account, tick / 10)
    assert due == {"at-the-end": 1.5, "near": 2.0, "far": 31.0}


def test_the_calls_of_any_second_stay_within_the_budget() -> None:
    schedule = started(max_calls=20)
    for number in range(5_000):
        schedule.seen(f"s{number}", 1.0)
        schedule.balance_read(f"a{number}", 0.0, 0.1)
    made: list[float] = []
    for tick in range(20, 400):
        made += [tick / 20] * len(calls(schedule, tick / 20))
    assert max(sum(at <= moment < at + 1 for moment in made) for at in made) <= 20 + 20 * 0.25
    assert len(made) >= 19 * 18


def test_what_takes_several_requests_is_asked_less_often() -> None:
    schedule = started(max_calls=20)
    schedule.ask_one_by_one(f"s{number}" for number in range(5_000))
    made = 0
    for tick in range(20, 420):
        for call in calls(schedule, tick / 20):
            assert isinstance(call, Query)
            assert len(call.subjects) == 1
            schedule.spend()
            schedule.spend()
            made += 3
    assert 20 * 20 - 3 <= made <= 20 * 20 + 5 * 3


def test_neither_access_nor_balances_starve_the_other() -> None:
    schedule = started(max_calls=20, refresh=1.0)
    for number in range(3_000):
        schedule.seen(f"s{number}", 1.0)
    for tick in range(20, 80):
        schedule.known(asked(calls(schedule, tick / 20)), tick / 20)
    for number in range(3_000):
        schedule.balance_read(f"a{number}", 0.0, 0.1)
    kinds = []
    for tick in range(80, 180):
        for call in calls(schedule, tick / 20):
            kinds.append(type(call))
            if isinstance(call, Query):
                schedule.known(call.subjects, tick / 20)
    assert min(kinds.count(Query), kinds.count(Balance)) >= len(kinds) * 0.4


def test_late_access_queries_go_before_balances_that_are_far_from_their_end() -> None:
    schedule = started(max_calls=20, refresh=1.0)
    for number in range(3_000):
        schedule.seen(f"s{number}", 1.0)
    for tick in range(20, 80):
        schedule.known(asked(calls(schedule, tick / 20)), tick / 20)
    for number in range(3_000):
        schedule.balance_read(f"a{number}", -100.0, None)
    kinds = []
    for tick in range(80, 180):
        for call in calls(schedule, tick / 20):
            kinds.append(type(call))
            if isinstance(call, Query):
                schedule.known(call.subjects, tick / 20)
    assert 0.2 < kinds.count(Balance) / len(kinds) < 0.3


def test_an_answer_429_pauses_all_calls_and_halves_their_rate() -> None:
    schedule = started(max_calls=100, refresh=0.1)
    for number in range(100_000):
        schedule.seen(f"s{number}", 1.0)
    schedule.refused(1.0, retry_after=3.0)
    made = {tick: len(calls(schedule, tick / 10)) for tick in range(10, 60)}
    assert sum(made[tick] for tick in range(10, 40)) == 0
    assert 40 <= sum(made[tick] for tick in range(40, 50)) <= 75


def test_a_call_that_failed_is_made_again() -> None:
    schedule = started()
    schedule.seen("a", 1.0)
    [call] = calls(schedule, 1.0)
    schedule.failed(call, 1.0)
    assert calls(schedule, 1.1) == []
    assert calls(schedule, 3.0) == [call]


def test_a_subject_without_requests_for_long_is_forgotten() -> None:
    schedule = started(forget_after=100)
    schedule.seen("a", 1.0)
    schedule.known(asked(calls(schedule, 1.0)), 1.0)
    assert schedule.idle(50.0) == []
    assert schedule.idle(102.0) == ["a"]
    assert asked(calls(schedule, 200.0)) == set()
