"""The source kong-admin, against an HTTP server with recordings of a real Kong (tests/data/kong-wire)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.sources.base import Readings
from syncd.sources.kong_admin import KongAdmin
from tests.syncd.servers import Answer, Asked, Server, serving

WIRE = Path(__file__).parents[2] / "data" / "kong-wire"
PAGES = ("admin-consumers-size1-page1", "admin-consumers-size1-page2", "admin-consumers-size1-page3-last")


def recorded(name: str) -> dict[str, object]:
    document: dict[str, object] = json.loads((WIRE / f"{name}.json").read_text())
    return document


class Kong:
    """Recorded answers: three pages of one consumer each; `override` may answer instead."""

    def __init__(
        self, *, status: str = "admin-status", override: Callable[[Asked], Answer | None] | None = None
    ):
        self._status = status
        self._override = override

    def __call__(self, asked: Asked) -> Answer:
        special = self._override(asked) if self._override else None
        if special is not None:
            return special
        path = asked.path.removeprefix("/team-a")
        if path == "/status":
            return Answer(recorded(self._status))
        if path == "/plugins":
            return Answer(recorded("admin-plugins"))
        if path == "/consumers":
            return Answer(self._page(asked.query.get("offset")))
        return Answer(recorded("admin-consumers-by-tag-500"), 500)  # the answer to GET /

    @staticmethod
    def _page(offset: str | None) -> dict[str, object]:
        # Without a database even the last full page has an offset; an empty page follows it.
        following = {recorded(name)["offset"]: after for name, after in itertools.pairwise(PAGES)}
        if offset == recorded(PAGES[-1])["offset"]:
            return {"next": None, "data": []}
        return recorded(following[offset] if offset else PAGES[0])


def source(
    server: Server, *, workspace: str | None = None, tags: tuple[str, ...] = (), token: str | None = None
) -> KongAdmin:
    endpoint = Endpoint(
        "kong-admin", server.url, "sources[0].token", "read consumers", "Kong-Admin-Token", token
    )
    return KongAdmin(endpoint, Retry(attempts=3, sleep=lambda _: None), workspace, tags)


def read(kong: Callable[[Asked], Answer], **options: object) -> tuple[list[Principal], Server]:
    with serving(kong) as server:
        return list(source(server, **options).read()), server  # type: ignore[arg-type]


def test_all_pages_are_read_to_the_end() -> None:
    principals, server = read(Kong())
    assert [principal.username for principal in principals] == ["anonymous", "alice", "bob"]
    asked = [request.query for request in server.asked if request.path == "/consumers"]
    assert [query.get("offset") for query in asked] == [
        None,
        *(recorded(page)["offset"] for page in PAGES),
    ]
    assert {query["size"] for query in asked} == {"1000"}


def test_an_empty_object_as_lua_writes_it_is_an_empty_page() -> None:
    def empty(asked: Asked) -> Answer | None:
        return Answer({"data": {}, "next": None}) if asked.path == "/consumers" else None

    assert read(Kong(override=empty))[0] == []


def test_the_fields_of_a_consumer_are_read() -> None:
    principals, _ = read(Kong())
    alice = principals[1]
    assert (alice.id, alice.custom_id) == ("b32379d9-3d28-5683-a79c-72139be6e34f", "cust-alice-001")
    assert alice.tags == ("gold", "team-a")


def test_the_consumer_that_a_plugin_uses_as_anonymous_is_flagged() -> None:
    principals, _ = read(Kong())
    assert {p.username: p.anonymous for p in principals} == {"anonymous": True, "alice": False, "bob": False}


def test_an_anonymous_consumer_named_by_id_is_flagged() -> None:
    bob = "def4f7d3-9863-5ad2-8fa9-c949bf26f55e"

    def by_id(asked: Asked) -> Answer | None:
        plugins = {"data": [{"name": "key-auth", "config": {"anonymous": bob}}], "next": None}
        return Answer(plugins) if asked.path == "/plugins" else None

    principals, _ = read(Kong(override=by_id))
    assert {p.username for p in principals if p.anonymous} == {"bob"}


def test_the_root_is_never_requested_because_it_answers_500() -> None:
    _, server = read(Kong())
    assert "GET /" not in server.paths()


def test_a_consumer_may_have_no_username() -> None:
    nameless = {"id": "7", "username": None, "custom_id": "crm", "tags": None}

    def one(asked: Asked) -> Answer | None:
        return Answer({"data": [nameless], "next": None}) if asked.path == "/consumers" else None

    (principal,), _ = read(Kong(override=one))
    assert (principal.username, principal.custom_id) == (None, "crm")


def test_a_page_that_names_only_the_next_link_is_followed() -> None:
    def links(asked: Asked) -> Answer | None:
        if asked.path != "/consumers":
            return None
        if "offset" in asked.query:
            return Answer({"data": [{"id": "2", "username": "b"}], "next": None})
        return Answer({"data": [{"id": "1", "username": "a"}], "next": "/consumers?offset=abc&size=1"})

    principals, _ = read(Kong(override=links))
    assert [principal.id for principal in principals] == ["1", "2"]


def test_without_a_database_tags_are_filtered_here_because_kong_would_answer_500() -> None:
    principals, server = read(Kong(), tags=("gold", "team-a"))
    assert [principal.username for principal in principals] == ["alice"]
    assert all("tags" not in request.query for request in server.asked)


def test_with_a_database_tags_are_sent_and_filtered_here_as_well() -> None:
    principals, server = read(Kong(status="admin-pg-status"), tags=("gold", "team-a"))
    assert [principal.username for principal in principals] == ["alice"]
    sent = [request.query.get("tags") for request in server.asked if request.path == "/consumers"]
    assert set(sent) == {"gold,team-a"}


def test_the_workspace_prefixes_all_requests_and_the_token_is_sent() -> None:
    principals, server = read(Kong(), workspace="team-a", token="t0ken")
    assert len(principals) == 3
    assert {"GET /team-a/consumers", "GET /team-a/plugins", "GET /team-a/status"} == set(server.paths())
    assert {request.headers["kong-admin-token"] for request in server.asked} == {"t0ken"}


@pytest.mark.parametrize("workspace", ["team-a", None])
def test_a_token_that_may_not_read_the_status_still_reads_consumers(workspace: str | None) -> None:
    def limited(asked: Asked) -> Answer | None:
        denied = {"message": "reader, you do not have permissions to read this resource"}
        return Answer(denied, 403) if asked.path.endswith("/status") else None

    principals, server = read(Kong(override=limited), workspace=workspace, token="t0ken", tags=("gold",))
    assert [principal.username for principal in principals] == ["alice"]
    assert all("tags" not in request.query for request in server.asked)


def test_a_token_that_may_read_nothing_is_refused_by_name() -> None:
    def refused(asked: Asked) -> Answer:
        return Answer({"message": "no"}, 403)

    with serving(refused) as server, pytest.raises(SourceError, match=r"sources\[0\]\.token"):
        source(server, workspace="team-a", token="t0ken").read()


def test_the_requests_that_kong_has_answered_are_read_from_its_status() -> None:
    with serving(Kong()) as server:
        assert source(server).requests_answered() == 57
    with serving(Kong(override=lambda asked: Answer({}, 403) if asked.path == "/status" else None)) as server:
        assert source(server).requests_answered() is None


@pytest.mark.parametrize("status", [404, 403], ids=["status unknown", "status forbidden"])
def test_a_workspace_on_an_open_source_kong_is_refused_with_the_cure(status: int) -> None:
    def open_source(asked: Asked) -> Answer | None:
        if asked.path == "/team-a/status":
            return Answer({"message": "Not found"}, status)
        return Answer({"message": "Not found"}, 404) if asked.path.startswith("/team-a") else None

    with serving(Kong(override=open_source)) as server, pytest.raises(SourceError) as caught:
        source(server, workspace="team-a").read()
    assert "has no workspace 'team-a'" in str(caught.value)
    assert "Kong Gateway Enterprise" in str(caught.value)


def test_a_kong_without_a_configuration_is_not_a_kong_without_consumers() -> None:
    def unconfigured(asked: Asked) -> Answer | None:
        return Answer({"configuration_hash": "0" * 32}) if asked.path == "/status" else None

    with (
        serving(Kong(override=unconfigured)) as server,
        pytest.raises(SourceError, match="not loaded its config"),
    ):
        source(server).read()
    assert server.paths() == ["GET /status"]


def test_a_500_is_retried() -> None:
    failures = [Answer(recorded("admin-consumers-by-tag-500"), 500), Answer(cut=True)]

    def flaky(asked: Asked) -> Answer | None:
        return failures.pop() if failures and asked.path == "/consumers" else None

    principals, _ = read(Kong(override=flaky))
    assert len(principals) == 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer({"message": "boom"}, 500), "boom"),
        (Answer(cut=True), "did not answer GET /consumers"),
        (Answer({"message": "Unauthorized"}, 401), r"sources\[0\]\.token"),
        (Answer({"message": "no"}, 403), "lacks permissions"),
        (Answer(recorded("admin-consumers-bad-offset-error"), 400), "not a valid offset"),
        (Answer(b"<html>"), "not JSON"),
        (Answer([]), "not a JSON object"),
        (Answer({"next": None}), "not a JSON array"),
        (Answer({"data": [{"username": "x"}]}), "no id"),
        (Answer({"data": [], "next": "/consumers?size=1"}), "no offset"),
        (Answer({}, 302, {"Location": "/login"}), "is its URL right"),
    ],
)
def test_an_unreadable_second_page_is_an_error_and_not_a_shorter_list(answer: Answer, says: str) -> None:
    def fail(asked: Asked) -> Answer | None:
        return answer if asked.path == "/consumers" and "offset" in asked.query else None

    with serving(Kong(override=fail)) as server, pytest.raises(SourceError, match=says):
        source(server).read()


def test_a_list_that_never_ends_is_an_error() -> None:
    def endless(asked: Asked) -> Answer | None:
        return Answer({"data": [], "offset": "same"}) if asked.path == "/consumers" else None

    with serving(Kong(override=endless)) as server, pytest.raises(SourceError, match="has no end"):
        source(server).read()


def test_an_unreachable_kong_is_an_error_that_names_it() -> None:
    with serving(Kong()) as server:
        gone = source(server)
    with pytest.raises(SourceError, match=r"source kong-admin: .* at http://127\.0\.0\.1:"):
        gone.read()


def test_a_configuration_that_changes_during_the_read_causes_another_read() -> None:
    # Without a database an offset is a position in a list that a new configuration replaces.
    hashes = iter(["a", "b", "b", "b"])

    def reloading(asked: Asked) -> Answer | None:
        return Answer({"configuration_hash": next(hashes)}) if asked.path == "/status" else None

    principals, server = read(Kong(override=reloading))
    assert len(principals) == 3
    assert sum("offset" not in asked.query for asked in server.asked if asked.path == "/consumers") == 2


def test_an_offset_that_a_new_configuration_made_invalid_causes_another_read() -> None:
    hashes, failures = iter("abbb"), [Answer(recorded("admin-consumers-bad-offset-error"), 400)]

    def reloading(asked: Asked) -> Answer | None:
        if asked.path == "/status":
            return Answer({"configuration_hash": next(hashes)})
        return failures.pop() if failures and "offset" in asked.query else None

    assert len(read(Kong(override=reloading))[0]) == 3


def test_a_configuration_that_keeps_changing_is_an_error() -> None:
    hashes = itertools.count()

    def reloading(asked: Asked) -> Answer | None:
        return Answer({"configuration_hash": str(next(hashes))}) if asked.path == "/status" else None

    with serving(Kong(override=reloading)) as server, pytest.raises(SourceError, match="changed during each"):
        source(server).read()


def test_a_configuration_that_is_missing_after_the_read_is_an_error() -> None:
    hashes = iter(["a", "0" * 32])

    def resetting(asked: Asked) -> Answer | None:
        return Answer({"configuration_hash": next(hashes)}) if asked.path == "/status" else None

    with (
        serving(Kong(override=resetting)) as server,
        pytest.raises(SourceError, match="not loaded its config"),
    ):
        source(server).read()


def test_an_unchanged_configuration_is_read_once() -> None:
    with serving(Kong()) as server:
        readings = Readings()
        first = readings.read(source(server))
        assert readings.read(source(server)) == first
    assert server.paths().count("GET /plugins") == 1


def test_a_new_configuration_or_another_source_is_read_again() -> None:
    hashes = ["a"]

    def answer(asked: Asked) -> Answer | None:
        return Answer({"configuration_hash": hashes[0]}) if asked.path == "/status" else None

    with serving(Kong(override=answer)) as server:
        readings = Readings()
        readings.read(source(server))
        hashes[0] = "b"
        readings.read(source(server))
        assert server.paths().count("GET /plugins") == 2
        assert [found.username for found in readings.read(source(server, tags=("gold",)))] == ["alice"]
        assert server.paths().count("GET /plugins") == 3


def test_a_kong_with_a_database_has_no_fingerprint_and_is_read_each_time() -> None:
    with serving(Kong(status="admin-pg-status")) as server:
        readings = Readings()
        assert source(server).fingerprint() is None
        readings.read(source(server))
        readings.read(source(server))
    assert server.paths().count("GET /plugins") == 2


def test_a_failed_reading_is_not_cached() -> None:
    failing = [True]

    def answer(asked: Asked) -> Answer | None:
        return Answer({"message": "no"}, 403) if failing[0] and asked.path == "/consumers" else None

    with serving(Kong(override=answer)) as server:
        readings = Readings()
        with pytest.raises(SourceError):
            readings.read(source(server))
        failing[0] = False
        assert len(readings.read(source(server))) == 3


def test_the_token_is_in_no_error_even_if_the_server_repeats_it() -> None:
    def echo(asked: Asked) -> Answer | None:
        return Answer({"message": f"bad token {asked.headers['kong-admin-token']}"}, 400)

    with serving(Kong(override=echo)) as server, pytest.raises(SourceError) as caught:
        source(server, token="s3cr3t-t0ken").read()
    assert "s3cr3t-t0ken" not in str(caught.value)
    assert "bad token ***" in str(caught.value)
