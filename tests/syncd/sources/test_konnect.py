"""The Konnect sources against an HTTP server whose lists have pages, shift and fail."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.sources.konnect import KonnectApplications, KonnectConsumers
from tests.syncd.konnect import PLANE, PORTAL, Konnect, application, consumer, registration, uid
from tests.syncd.servers import Answer, Asked, Server, serving


def endpoint(server: Server) -> Endpoint:
    return Endpoint("konnect", server.url, "sources[0].token", "read", token="kpat_secret")


def retry(waits: list[float] | None = None) -> Retry:
    return Retry(attempts=3, sleep=(waits if waits is not None else []).append)


def applications(konnect: Konnect, waits: list[float] | None = None) -> Sequence[Principal]:
    with serving(konnect) as server:
        return KonnectApplications(endpoint(server), retry(waits), PORTAL).read()


def consumers(konnect: Konnect, *tags: str) -> Sequence[Principal]:
    with serving(konnect) as server:
        return KonnectConsumers(endpoint(server), retry(), PLANE, tags).read()


def names(found: Sequence[Principal]) -> list[str | None]:
    return [principal.username for principal in found]


def test_all_pages_of_applications_are_read_with_their_owners() -> None:
    team = ("team", uid("team"))
    found = applications(Konnect([application(1), application(2, owner=team), application(3, owner=None)]))
    assert [(p.kind, p.username) for p in found] == [("application", f"app-{n}") for n in (1, 2, 3)]
    assert [p.owner for p in found] == [
        "developer:33333333-3333-4333-8333-333333333333",
        f"team:{uid('team')}",
        None,
    ]


def test_a_portal_without_applications_is_an_empty_list() -> None:
    assert applications(Konnect()) == []


def test_the_consumer_that_an_application_is_mapped_to_is_returned_once() -> None:
    registrations = [
        registration(1, "app-1", "alice", custom_id="crm-1"),
        registration(2, "app-1", "alice", custom_id="crm-1"),
        registration(3, "app-2"),
    ]
    found = applications(Konnect([application(1), application(2)], registrations))
    assert [(p.kind, p.username, p.application) for p in found] == [
        ("application", "app-1", None),
        ("application", "app-2", None),
        ("consumer", "alice", uid("app-1")),
    ]
    assert (found[2].id, found[2].custom_id) == (uid("alice"), "crm-1")


def test_a_registration_of_an_application_added_during_the_read_waits_for_the_next_run() -> None:
    assert names(applications(Konnect([application(1)], [registration(1, "app-9", "alice")]))) == ["app-1"]


def test_registrations_are_optional() -> None:
    with serving(Konnect([application(1)])) as server:
        KonnectApplications(endpoint(server), retry(), PORTAL, mapped_consumers=False).read()
    assert server.paths() == [f"GET /v3/portals/{PORTAL}/applications"]


def test_a_page_that_shifts_during_the_read_causes_another_read() -> None:
    def delete_one(konnect: Konnect, asked: Asked) -> None:
        if asked.query.get("page[number]") == "2" and len(konnect.applications) == 5:
            del konnect.applications[0]

    found = applications(Konnect([application(n) for n in range(5)], before=delete_one))
    assert names(found) == ["app-1", "app-2", "app-3", "app-4"]


def test_a_deletion_and_an_addition_at_once_hide_no_entry() -> None:
    def swap(konnect: Konnect, asked: Asked) -> None:
        if asked.query.get("page[number]") == "2" and len(konnect.applications) == 5:
            konnect.applications[:] = [*konnect.applications[1:], application(9)]
            konnect.before = lambda _konnect, _asked: None

    found = applications(Konnect([application(n) for n in range(5)], before=swap))
    assert names(found) == ["app-1", "app-2", "app-3", "app-4", "app-9"]


def test_a_list_that_keeps_changing_is_an_error() -> None:
    def grow(konnect: Konnect, _asked: Asked) -> None:
        konnect.applications.append(application(len(konnect.applications)))

    with pytest.raises(SourceError, match="changed during each of 3 readings"):
        applications(Konnect([application(n) for n in range(5)], before=grow))


def fail_on(number: str, answer: Answer, times: int) -> Konnect:
    left = [answer] * times

    def before(_konnect: Konnect, asked: Asked) -> Answer | None:
        return left.pop() if left and asked.query.get("page[number]") == number else None

    return Konnect([application(n) for n in range(20)], before=before)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer({"title": "Internal"}, 500), "HTTP 500"),
        (Answer({"title": "Too many"}, 429), "HTTP 429"),
        (Answer(cut=True), "did not answer"),
        (Answer({"detail": "expired"}, 401), r"sources\[0\]\.token"),
        (Answer({"detail": "no"}, 403), "lacks permissions"),
        (Answer(b"<html>", 200), "not JSON"),
    ],
)
def test_a_failure_on_page_7_is_an_error_and_not_a_shorter_list(answer: Answer, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        applications(fail_on("7", answer, 9))
    assert "kpat_secret" not in str(caught.value)
    assert "source konnect-applications" in str(caught.value)


def test_a_transient_failure_is_retried_after_the_wait_that_the_server_asks_for() -> None:
    waits: list[float] = []
    found = applications(fail_on("7", Answer({"title": "Too many"}, 429, {"Retry-After": "7"}), 2), waits)
    assert len(found) == 20
    assert [round(wait) for wait in waits] == [7, 7]


def test_a_mapped_consumer_without_id_is_an_error() -> None:
    broken = {"id": "r", "application": {"id": uid("app-1")}, "consumer": {"username": "x"}}
    page = {"data": [broken], "meta": {"page": {"number": 1, "size": 2, "total": 1}}}
    scripted = Konnect(
        [application(1)], before=lambda _, asked: Answer(page) if "registrations" in asked.path else None
    )
    with pytest.raises(SourceError, match="registration r has no id"):
        applications(scripted)


def test_all_pages_of_consumers_are_read() -> None:
    found = consumers(Konnect(consumers=[consumer(f"c{n}") for n in range(7)]))
    assert sorted(str(name) for name in names(found)) == [f"c{n}" for n in range(7)]
    assert {principal.source for principal in found} == {"konnect-consumers"}


def test_a_control_plane_without_consumers_is_an_empty_list() -> None:
    assert consumers(Konnect()) == []


def test_consumers_deleted_during_the_read_hide_none_that_stay() -> None:
    def change(konnect: Konnect, asked: Asked) -> None:
        if "offset" in asked.query and asked.path.endswith("/consumers"):
            konnect.consumers[:] = [c for c in konnect.consumers if c["username"] != "c0"]

    stays = [consumer(f"c{n}") for n in range(9)]
    found = consumers(Konnect(consumers=stays, before=change))
    assert {f"c{n}" for n in range(1, 9)} <= {str(name) for name in names(found)}


def test_only_consumers_with_all_tags_are_returned() -> None:
    everyone = [consumer("a", tags=["x", "y"]), consumer("b", tags=["x"]), consumer("c", tags=None)]
    assert names(consumers(Konnect(consumers=everyone), "x", "y")) == ["a"]


def test_the_anonymous_consumer_of_a_control_plane_is_flagged() -> None:
    konnect = Konnect(
        consumers=[consumer("guest"), consumer("alice")],
        plugins=[{"id": uid("plugin"), "name": "key-auth", "config": {"anonymous": uid("guest")}}],
    )
    assert {p.username for p in consumers(konnect) if p.anonymous} == {"guest"}


def test_the_token_is_sent_as_a_bearer_token() -> None:
    with serving(Konnect()) as server:
        KonnectConsumers(endpoint(server), retry(), PLANE).read()
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer kpat_secret"}
