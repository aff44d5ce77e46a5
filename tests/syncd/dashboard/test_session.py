"""Sessions, form tokens and the login limit."""

from __future__ import annotations

from syncd.dashboard.session import IDLE, LIFETIME, LoginLimit, Sessions, is_id, new_id


class Clock:
    """A clock that only moves when it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_is_open_for_its_own_id_and_the_token_it_was_opened_with() -> None:
    sessions = Sessions()
    identity = sessions.begin("t0ken")
    assert sessions.is_open(identity, "t0ken")
    assert not sessions.is_open(new_id(), "t0ken")
    assert not sessions.is_open(identity, "another token")


def test_a_session_that_met_another_token_stays_closed() -> None:
    sessions = Sessions()
    identity = sessions.begin("t0ken")
    sessions.is_open(identity, "another token")
    assert not sessions.is_open(identity, "t0ken")


def test_an_idle_session_ends() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    identity = sessions.begin("t0ken")
    clock.now += IDLE - 1
    assert sessions.is_open(identity, "t0ken")
    clock.now += IDLE - 1
    assert sessions.is_open(identity, "t0ken")
    clock.now += IDLE
    assert not sessions.is_open(identity, "t0ken")


def test_a_session_ends_after_its_lifetime_however_much_it_is_used() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    identity = sessions.begin("t0ken")
    for _ in range(int(LIFETIME / 1800) - 1):
        clock.now += 1800
        assert sessions.is_open(identity, "t0ken")
    clock.now += 1800
    assert not sessions.is_open(identity, "t0ken")


def test_a_session_ends_by_logout() -> None:
    sessions = Sessions()
    identity = sessions.begin("t0ken")
    sessions.end(identity)
    assert not sessions.is_open(identity, "t0ken")


def test_the_oldest_session_is_evicted() -> None:
    sessions = Sessions()
    opened = [sessions.begin("t0ken") for _ in range(201)]
    assert not sessions.is_open(opened[0], "t0ken")
    assert sessions.is_open(opened[1], "t0ken")
    assert sessions.is_open(opened[-1], "t0ken")


def test_a_form_belongs_to_one_visitor_of_one_process() -> None:
    sessions, other = Sessions(), Sessions()
    identity, other_identity = new_id(), new_id()
    mine = sessions.form_token(identity)
    assert sessions.owns_form(identity, mine)
    assert not sessions.owns_form(other_identity, mine)
    assert not sessions.owns_form(identity, "")
    assert not sessions.owns_form(identity, "für mich")
    assert not other.owns_form(identity, mine)
    assert identity not in mine


def test_ids_are_long_and_unique() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(map(is_id, ids))
    assert not is_id("short")
    assert not is_id(new_id() + "\n")
    assert not is_id("<" * 43)


def test_five_attempts_from_an_address_make_it_wait() -> None:
    clock = Clock()
    limit = LoginLimit(clock)
    assert [limit.admit("a") for _ in range(5)] == [0.0] * 5
    clock.now += 20
    assert limit.admit("a") == 40.0
    assert limit.admit("b") == 0.0
    clock.now += 40
    assert limit.admit("a") == 0.0


def test_refused_attempts_do_not_prolong_the_wait() -> None:
    clock = Clock()
    limit = LoginLimit(clock)
    for _ in range(5):
        limit.admit("a")
    clock.now += 30
    assert [limit.admit("a") for _ in range(20)] == [30.0] * 20
    clock.now += 30
    assert limit.admit("a") == 0.0


def test_many_addresses_together_are_limited_too() -> None:
    limit = LoginLimit(Clock(), by_all=8)
    assert [limit.admit(str(address)) for address in range(8)] == [0.0] * 8
    assert limit.admit("another") == 60.0
