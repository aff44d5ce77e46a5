"""Final hours of a gateway's ledger, however events move while it and the meters are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.audit.books import OtherDestination, gateway_books, leads_to, merged, other_destinations
from syncd.audit.compare import HOUR, Line, Yardstick, compare
from syncd.gateways.models import Ledger, LedgerLine, Spool

START = datetime(2026, 11, 22, 7, tzinfo=UTC)
END = START + 2 * HOUR
KIND, OURS, OTHER = "kong.api_request", "ours", "other"
NUMBERS = ("requests", "metered", "quarantined", "resent", "events", "delivered", "dead_lettered", "waiting")
BOOKS: dict[str, object] = {**dict.fromkeys(NUMBERS, 0), "skipped": {}, "lost": {}}


@dataclass
class Event:
    """An event that is sent and accounted for in any order, then delivered or dead-lettered."""

    destination: str
    hour: datetime
    subject: str
    accounted: bool = False
    sent: bool = False
    booked: bool = False
    dead: bool = False

    @property
    def waits(self) -> bool:
        return not (self.booked or self.dead)


@dataclass
class Moving:
    """A spool whose events move, and a meter that counts the events sent to it."""

    events: list[Event] = field(default_factory=list)

    def ledger(self) -> Ledger:
        lines: dict[tuple[str, datetime, str], Counter[str]] = {}
        for event in self.events:
            if event.accounted:
                numbers = lines.setdefault((event.destination, event.hour, event.subject), Counter())
                numbers.update(accepted=1, delivered=int(event.booked), dead=int(event.dead))
        return Ledger(
            lines=tuple(
                LedgerLine(
                    destination=destination,
                    hour=hour,
                    type=KIND,
                    subject=subject,
                    accepted=numbers["accepted"],
                    delivered=numbers["delivered"],
                    dead_lettered=numbers["dead"],
                    waiting=numbers["accepted"] - numbers["delivered"] - numbers["dead"],
                )
                for (destination, hour, subject), numbers in lines.items()
            ),
            hours_with_waiting_events=frozenset(event.hour for event in self.events if event.waits),
        )

    def spool(self) -> Spool:
        parts = [self._part(name) for name in (OURS, OTHER)]
        return Spool.model_validate(
            {
                "delivery_running": True,
                "total": parts[0],
                "destinations": parts,
                "dead_letters": 0,
                "quarantined": 0,
            }
        )

    def _part(self, name: str) -> dict[str, object]:
        new = sum(event.destination == name and not event.accounted for event in self.events)
        return {
            "id": name,
            "endpoint": f"http://{name}/api/v1/events",
            "books": BOOKS,
            "not_accounted": {"requests": new, "events": new},
            "backlog": sum(event.destination == name and event.waits for event in self.events),
            "oldest_waiting": None,
            "bytes": 0,
        }

    def meter(self) -> dict[Line, int]:
        sent = (event for event in self.events if event.sent and event.destination == OURS)
        return Counter(Line(event.hour, KIND, event.subject) for event in sent)

    def move(self, step: tuple[str, int]) -> None:
        what, number = step
        if what in {"write", "arrive"}:
            destination = (OURS, OTHER)[number % 2]
            hour = START + (number // 2 % 2) * HOUR
            event = Event(destination, hour, ("alice", "bob")[number // 4 % 2])
            event.accounted = event.sent = event.booked = what == "arrive"
            self.events.append(event)
        elif self.events:
            event = self.events[number % len(self.events)]
            if what == "account":
                event.accounted = True
            elif what == "send":
                event.sent = True
            elif what == "finish" and event.waits:
                event.accounted = event.sent = event.booked = True
            elif event.accounted and event.waits:
                # A refused event may still be counted: its answer was lost, and then it grew too old.
                event.booked, event.dead = event.sent and what == "book", what == "refuse"


MOVES = ("write", "account", "send", "book", "refuse", "arrive", "finish")
steps = st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 63)), max_size=20)


@given(steps, steps, steps, steps)
def test_events_that_move_during_the_audit_never_cause_a_difference(
    before: list[tuple[str, int]],
    first: list[tuple[str, int]],
    second: list[tuple[str, int]],
    third: list[tuple[str, int]],
) -> None:
    moving = Moving()
    for step in before:
        moving.move(step)
    earlier = moving.ledger()
    for step in first:
        moving.move(step)
    counted = moving.meter()
    for step in second:
        moving.move(step)
    spool = moving.spool()
    for step in third:
        moving.move(step)
    books = gateway_books("east", earlier, spool, moving.ledger(), frozenset({OURS}))
    result = compare(START, END, [books], counted, {KIND: Yardstick(KIND, "requests")})
    assert [one for one in result.differences if one.missing or one.surplus] == []


def still(*events: Event) -> Moving:
    return Moving(list(events))


def open_hours(moving: Moving) -> set[datetime]:
    ledger = moving.ledger()
    return set(gateway_books("east", ledger, moving.spool(), ledger, frozenset({OURS})).open_hours)


def booked(destination: str, hour: datetime) -> Event:
    return Event(destination, hour, "alice", accounted=True, sent=True, booked=True)


def test_events_waiting_for_another_destination_leave_out_no_hour() -> None:
    waiting = Event(OTHER, START, "alice", accounted=True)
    assert open_hours(still(waiting, booked(OURS, START))) == set()


def test_events_waiting_for_our_destination_leave_out_their_hour_only() -> None:
    waiting = Event(OURS, START, "alice", accounted=True)
    others = (booked(OURS, START + HOUR), Event(OTHER, START + HOUR, "bob"))
    assert open_hours(still(waiting, *others)) == {START}


def test_events_of_our_destination_not_accounted_for_leave_out_every_waiting_hour() -> None:
    new = Event(OURS, START, "alice")
    waiting = Event(OTHER, START + HOUR, "bob", accounted=True)
    assert open_hours(still(new, waiting)) == {START, START + HOUR}


def test_an_hour_whose_lines_changed_is_left_out_with_the_reason() -> None:
    moving = still(booked(OURS, START))
    before = moving.ledger()
    moving.events.append(booked(OURS, START))
    books = gateway_books("east", before, moving.spool(), moving.ledger(), frozenset({OURS}))
    assert books.open_hours == {START: "the ledger of east changed while it was read"}


@pytest.mark.parametrize(
    ("endpoint", "leads"),
    [
        ("http://openmeter:8888/api/v1/events", True),
        ("http://OpenMeter:8888/elsewhere", True),
        ("http://openmeter:9999/api/v1/events", False),
        ("https://openmeter/api/v1/events", False),
        ("http://openmeter.internal:8888/api/v1/events", False),
        ("https://ingest.example/api/v1/events", True),
        ("http://ingest.example:81/api/v1/events", True),
        ("http://by-port:8889/api/v1/events", True),
        ("http://by-port:8890/api/v1/events", False),
        (None, False),
    ],
)
def test_a_destination_leads_here_by_host_and_port_or_by_a_name_that_is_listed(
    endpoint: str | None, leads: bool
) -> None:
    others = ("ingest.example", "by-port:8889")
    assert leads_to(endpoint, "http://openmeter:8888", others) is leads


def test_the_port_of_a_scheme_may_be_left_out() -> None:
    assert leads_to("https://us.api.konghq.com:443/v3/openmeter/events", "https://us.api.konghq.com/v3")


def test_other_destinations_are_listed_once_with_all_their_events() -> None:
    moving = still(booked(OTHER, START), booked(OTHER, START + HOUR), booked(OURS, START))
    found = other_destinations("east", moving.spool(), moving.ledger(), frozenset({OURS}))
    assert found == (OtherDestination("east", OTHER, "http://other/api/v1/events", 2),)
    assert merged([*found, *found]) == (OtherDestination("east", OTHER, "http://other/api/v1/events", 4),)
