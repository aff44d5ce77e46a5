"""The directory over a real database: what is written, found and settled."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from syncd.core.changes import Change, ChangeKind, EntityState, Outcome, Plan, Status
from syncd.core.model import ObservedCustomer, Principal
from syncd.core.unbilled import UnbilledSubject, UnbilledUsage
from syncd.customers.directory import Directory
from syncd.customers.known import Concern, KnownCustomer, Name
from syncd.metering.usage import owners
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.syncd.builders import OWNER, consumer, customer

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with State(StateLocation(tmp_path)) as state:
        yield Directory(state)


def observe(
    directory: Directory,
    *customers: ObservedCustomer,
    principals: dict[str, Principal] | None = None,
    at: datetime = NOW,
) -> None:
    directory.observe(customers, (principals or {}).items(), OWNER, at)


def plan(*changes: Change) -> Plan:
    return Plan(OWNER, "sync", changes)


def keys(directory: Directory) -> list[str | None]:
    return [one.key for one in directory.customers()]


def found(directory: Directory, text: str) -> set[str]:
    return set(directory.search(text))


def test_before_the_first_run_nothing_is_known(directory: Directory) -> None:
    assert directory.edition() is None
    assert directory.customers() == ()
    assert directory.customer("acme") is None


def test_customers_are_kept_as_they_were_observed(directory: Directory) -> None:
    theirs = {"managed-by": "kong-openmeter", "sync-owner": "staging"}
    observe(
        directory,
        customer("acme", "consumer:1", "consumer:2", name="Acme", owner=OWNER, subscription="sub-1"),
        customer("hand", name="By hand"),
        customer("other", name="Other", metadata=theirs),
        customer(None, "free", name="Zoe", metadata={"managed-by": "terraform"}, identity="01Z"),
    )
    acme, hand, other, zoe = directory.customers()
    assert acme == KnownCustomer(
        "id-acme", "acme", "Acme", ("consumer:1", "consumer:2"), "syncd", None, "sub-1"
    )
    assert [one.managed_by for one in (acme, hand, other, zoe)] == [
        "syncd",
        "Finance (not managed)",
        "the syncd with owner_id staging (not managed)",
        "terraform (not managed)",
    ]
    assert directory.customer("acme") == acme
    assert directory.customer("01Z") == zoe, "one without a key is found by its id"


def test_a_key_goes_before_the_id_of_another_customer(directory: Directory) -> None:
    observe(directory, customer("other", identity="acme"), customer("acme", identity="01A"))
    assert getattr(directory.customer("acme"), "id", None) == "01A"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("ACME inc", {"id-acme"}),
        ("acme-k", {"id-acme"}),
        ("consumer:4711", {"id-acme"}),
        ("Alice", {"id-acme"}),
        ("crm-9", {"id-acme"}),
        ("tier:gold", {"id-acme"}),
        ("straße", {"id-strasse"}),
        ("STRASSE", {"id-strasse"}),
        ("100%", {"id-percent"}),
        ("_", {"id-percent"}),
        ("consumer:", {"id-acme", "id-percent"}),
        ("nobody", set()),
    ],
)
def test_a_search_finds_a_customer_by_whatever_people_call_it(
    directory: Directory, text: str, ids: set[str]
) -> None:
    """By name, key and subject as before, and by the names behind its subjects, in any case."""
    alice = consumer("4711", "alice", "tier:gold", custom_id="crm-9")
    observe(
        directory,
        customer("acme-key", "consumer:4711", name="Acme Inc", identity="id-acme"),
        customer("s", name="Straße", identity="id-strasse"),
        customer("p", "consumer:2_", name="100% sure", identity="id-percent"),
        principals={"consumer:4711": alice},
    )
    assert found(directory, text) == ids


def test_the_names_behind_subjects_survive(directory: Directory) -> None:
    alice = consumer("1", "alice", "a", "b", custom_id="crm", source="kong")
    bob = Principal("application", "2", "portal", "Bob's app", owner="developer:7")
    directory.observe((), [("shared", alice), ("shared", bob), ("own", bob)], OWNER, NOW)
    assert directory.names(["shared", "own", "unknown"]) == {
        "shared": [
            Name("consumer", "1", "alice", "crm", ("a", "b"), "kong"),
            Name("application", "2", "Bob's app", None, (), "portal"),
        ],
        "own": [Name("application", "2", "Bob's app", None, (), "portal")],
    }


def test_a_run_that_observes_the_same_writes_only_the_time(directory: Directory) -> None:
    both = (customer("a", "1"), customer("b", "2"))
    names = {"1": consumer("1", "alice"), "2": consumer("2", "bob")}
    observe(directory, *both, principals=names)
    first = directory.edition()
    later = NOW + timedelta(minutes=5)
    observe(directory, *reversed(both), principals=dict(reversed(names.items())), at=later)
    second = directory.edition()
    assert first is not None
    assert second is not None
    assert (second.version, second.at) == (first.version, later)
    observe(directory, *both, principals=names | {"2": consumer("2", "robert")}, at=later)
    assert getattr(directory.edition(), "version", None) == first.version + 1
    assert directory.names(["2"])["2"][0].username == "robert"
    assert found(directory, "bob") == set()


def test_a_customer_that_is_gone_is_forgotten_with_its_names(directory: Directory) -> None:
    observe(directory, customer("a", "1"), principals={"1": consumer("1", "alice")})
    observe(directory, customer("b", "2"))
    assert keys(directory) == ["b"]
    assert directory.names(["1"]) == {}


def test_texts_that_no_database_holds_end_no_run_and_reach_no_page(directory: Directory) -> None:
    """Half a surrogate pair, which no page can show; two subjects that differ in nothing else are one."""
    observe(
        directory,
        customer("a\ud800", "s\ud800", "s\x00", name="n\x00"),
        principals={"s\ud800": consumer("1", "u\ud800", "t\x00"), "s\x00": consumer("2", "other")},
    )
    (one,) = directory.customers()
    assert (one.key, one.subject_keys) == ("a\ufffd", ("s\ufffd", "s\x00"))
    (name,) = directory.names(["s\ufffd"])["s\ufffd"]
    assert (name.username, name.tags) == ("u\ufffd", ("t\x00",))


def test_what_a_run_made_is_known_at_once(directory: Directory) -> None:
    observe(
        directory,
        customer("a", "1", "2", owner=OWNER),
        customer("gone", "3", owner=OWNER),
        customer("hand"),
        principals={"4": consumer("4", "dave"), "5": consumer("5", "eve")},
    )
    changes = (
        Change(ChangeKind.ADOPT_CUSTOMER, "hand", (), "", "id-hand"),
        Change(ChangeKind.MOVE_SUBJECTS, "a", ("2",), "", "id-a", to_customer_key="new"),
        Change(ChangeKind.CREATE_CUSTOMER, "new", ("2", "4"), "", after=EntityState("New", ("2", "4"))),
        Change(ChangeKind.ATTACH_SUBJECTS, "hand", ("5",), "", "id-hand"),
        Change(ChangeKind.RENAME_CUSTOMER, "a", (), "", "id-a", after=EntityState("Renamed")),
        Change(ChangeKind.DELETE_CUSTOMER, "gone", (), "", "id-gone"),
    )
    done = [Outcome(change, Status.DONE) for change in changes]
    directory.settle(plan(*changes), done, None)
    assert [(one.name, one.subject_keys, one.keeper) for one in directory.customers()] == [
        ("New", ("2", "4"), "syncd"),
        ("Renamed", ("1",), "syncd"),
        ("hand", ("5",), "syncd"),
    ]
    new = directory.customer("new")
    assert new is not None
    assert new.is_unseen
    assert found(directory, "dave") == {new.id}
    assert found(directory, "eve") == {"id-hand"}

    observe(directory, customer("new", "2", "4", owner=OWNER, identity="01NEW"))
    assert [(one.id, one.is_unseen) for one in directory.customers()] == [("01NEW", False)]


def test_a_change_that_was_blocked_changes_nothing(directory: Directory) -> None:
    observe(directory, customer("a", "1", owner=OWNER))
    attach = Change(ChangeKind.ATTACH_SUBJECTS, "a", ("2",), "", "id-a")
    directory.settle(plan(attach), [Outcome(attach, Status.BLOCKED, "409")], None)
    assert directory.customers()[0].subject_keys == ("1",)


def test_an_observation_after_a_change_is_taken_even_if_it_equals_that_before_it(
    directory: Directory,
) -> None:
    """Somebody undid what the run did: the digest must not hide that."""
    observe(directory, customer("a", "1", owner=OWNER))
    attach = Change(ChangeKind.ATTACH_SUBJECTS, "a", ("2",), "", "id-a")
    directory.settle(plan(attach), [Outcome(attach, Status.DONE)], None)
    observe(directory, customer("a", "1", owner=OWNER))
    assert directory.customers()[0].subject_keys == ("1",)


def test_what_stands_against_a_customer_is_known_with_its_unbilled_usage(directory: Directory) -> None:
    observe(directory, customer("a", "1", owner=OWNER))
    blocked = Change(ChangeKind.BLOCKED, "a", ("2", "3"), "a subscription", "id-a")
    waiting = Change(ChangeKind.CREATE_CUSTOMER, "b", ("4", "5"), "new")
    nobody = Change(ChangeKind.BLOCKED, None, ("6",), "no key")
    unbilled = UnbilledUsage(
        (
            UnbilledSubject("2", 7, 20, "blocked"),
            UnbilledSubject("4", 1, 0, "planned"),
            UnbilledSubject("9", 5, 0, "unknown"),
        ),
        "2026-10-29T00:00:00Z",
    )
    directory.settle(plan(blocked, waiting, nobody), [], unbilled)
    assert directory.concerns("a") == (
        Concern("a", "2", True, "a subscription", 7, 20),
        Concern("a", "3", True, "a subscription"),
    )
    assert directory.concerns("b") == (Concern("b", "4", False, "new", 1, 0),)
    assert len(directory.all_concerns()) == 3
    before = directory.edition()
    directory.settle(plan(blocked, waiting, nobody), [], unbilled)
    assert directory.edition() == before, "nothing new is nothing to write"
    directory.settle(plan(), [], None)
    assert directory.all_concerns() == ()


def test_a_search_finds_the_customer_that_a_blocked_consumer_is_meant_for(directory: Directory) -> None:
    observe(directory, customer("a", "1", owner=OWNER), principals={"2": consumer("2", "Late")})
    assert found(directory, "late") == set()
    blocked = Change(ChangeKind.BLOCKED, "a", ("2",), "a subscription", "id-a")
    directory.settle(plan(blocked), [], None)
    assert found(directory, "LATE") == {"id-a"}


def test_usage_is_attributed_as_the_metering_api_does(directory: Directory) -> None:
    observe(directory, customer("a", "1", "b"), customer("b", "2"))
    a, b = directory.customers()
    assert owners((a, b)) == {"1": "id-a", "a": "id-a", "b": "id-b", "2": "id-b"}
    assert directory.attributed(a) == ("1", "a"), "its subject b is the key of another, who pays for it"
    assert directory.attributed(b) == ("2", "b")
