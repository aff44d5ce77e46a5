"""The client of the plugin's API, against a real plugin server and against invalid answers."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.config.sections import GatewayConfig
from syncd.core.errors import GatewayError
from syncd.gateways.client import Gateway
from syncd.runs.factory import gateways_of
from tests.harness.process import eventually
from tests.syncd.audits import HOUR, TOKEN, Audited, Site, audited, hours_ago, site, subject_of
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

FIRST, SECOND = hours_ago(30), hours_ago(4)
BEGINNING, END = hours_ago(40), hours_ago(0)
ALICE, BOB = subject_of("alice"), subject_of("bob")
REFUSED = "request-that-is-refused"
SECRET = "token-that-must-never-be-shown"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """A gateway: 5 events of two hours delivered, 1 refused."""
    with audited(tmp_path_factory.mktemp("gateway"), "east") as running:
        (east,) = running.sites
        running.metering.fault(event_id=REFUSED, status=400)
        east.serve("alice", FIRST, 3)
        east.serve("alice", FIRST, 1, request_id=REFUSED)
        east.serve("bob", SECOND, 2)
        yield running


@pytest.fixture
def there(deployment: Audited) -> Site:
    return deployment.sites[0]


@pytest.fixture
def gateway(there: Site) -> Iterator[Gateway]:
    with gateway_at(there.url, TOKEN) as client:
        yield client


def gateway_at(url: str, token: str | None = None) -> closing[Gateway]:
    settings = {"name": "east", "url": url, "timeout": "5s"} | ({"token": token} if token else {})
    return closing(Gateway(GatewayConfig.model_validate(settings), 2, attempts=1))


def answered(there: Site, path: str) -> dict[str, Any]:
    """Return the plugin's own answer to a GET."""
    answer = httpx.get(f"{there.url}{path}", headers={"authorization": f"Bearer {TOKEN}"})
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def failure(url: str, token: str | None = SECRET) -> str:
    with gateway_at(url, token) as gateway, pytest.raises(GatewayError) as error:
        gateway.spool()
    assert error.value.gateway == "east"
    assert SECRET not in str(error.value)
    return str(error.value)


# Reads


def test_the_books_are_read(gateway: Gateway, there: Site) -> None:
    spool = gateway.spool()
    books = spool.total.books
    assert (books.events, books.delivered, books.dead_lettered, books.waiting) == (6, 5, 1, 0)
    assert [part.endpoint for part in spool.destinations] == [there.config["ingest_endpoint"]]
    assert (spool.delivery_running, spool.dead_letters) == (True, 1)


@pytest.mark.parametrize("page_size", [1, 10_000])
def test_the_ledger_is_read_to_its_last_page(gateway: Gateway, page_size: int) -> None:
    ledger = gateway.ledger(BEGINNING, END, page_size=page_size)
    assert [(line.hour, line.subject, line.delivered, line.dead_lettered) for line in ledger.lines] == [
        (FIRST, ALICE, 3, 1),
        (SECOND, BOB, 2, 0),
    ]
    assert ledger.hours_with_waiting_events == frozenset()


def test_the_ledger_is_filtered_by_hours_and_subject(gateway: Gateway) -> None:
    assert [line.hour for line in gateway.ledger(SECOND, SECOND + HOUR).lines] == [SECOND]
    assert gateway.ledger(SECOND + HOUR, END).lines == ()
    assert gateway.ledger(BEGINNING, SECOND).lines == gateway.ledger(BEGINNING, END, ALICE).lines


def test_dead_letters_are_read_page_by_page(gateway: Gateway) -> None:
    page = gateway.dead_letters()
    (letter,) = page.dead_letters
    assert (letter.event_id, letter.subject, letter.status) == (REFUSED, ALICE, 400)
    assert gateway.dead_letters(after=letter.id).dead_letters == ()
    assert page.next is None


def test_events_of_one_subject_or_of_all_are_redelivered(gateway: Gateway) -> None:
    def done(number: int) -> bool:
        return gateway.redelivery(number).state == "done"

    for subject, sent in ((ALICE, 3), (None, 5)):
        asked = gateway.redeliver(BEGINNING, END, subject)
        assert (asked.subject, asked.sent) == (subject, 0)
        eventually(lambda number=asked.id: done(number))  # type: ignore[misc]
        assert gateway.redelivery(asked.id).sent == sent


def test_readiness_includes_the_problems(there: Site) -> None:
    with gateway_at(there.url) as gateway:
        eventually(lambda: gateway.readiness().ready, what="readiness")
    not_ready = Answer({"ready": False, "problems": ["the spool's file system is full"]}, status=503)
    with serving(lambda _: not_ready) as fake, gateway_at(fake.url) as gateway:
        assert gateway.readiness().problems == ("the spool's file system is full",)


def test_an_api_on_a_unix_socket_is_read(tmp_path: Path) -> None:
    options = ("--api", f"unix:{tmp_path}/api")
    with site(tmp_path, "east", "http://127.0.0.1:9", *options) as local, local.client() as gateway:
        eventually(lambda: gateway.readiness().ready, what="readiness")
        assert gateway.spool().destinations == ()


def test_a_missing_unix_socket_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # httpcore leaves a socket whose connect failed to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        message = failure(f"unix:{tmp_path}/nothing")
        gc.collect()
    assert f"unix:{tmp_path}/nothing" in message


def test_hours_with_waiting_events_are_returned(tmp_path: Path) -> None:
    with site(tmp_path, "east", "http://127.0.0.1:9") as away, away.client() as gateway:
        hour = hours_ago(5)
        away.serve("alice", hour, 2, settled=False)
        ledger = gateway.ledger(hour - HOUR, hour + HOUR)
        assert ledger.hours_with_waiting_events == {hour}
        assert gateway.ledger(hour + HOUR, hour + 2 * HOUR).hours_with_waiting_events == frozenset()


# Failures


def test_a_wrong_token_is_named_by_its_setting_and_never_shown(there: Site) -> None:
    assert "the token of gateways[2].token" in failure(there.url)
    assert "no token is set in gateways[2].token" in failure(there.url, None)


def test_a_gateway_that_does_not_answer_is_named_with_what_to_do() -> None:
    message = failure("http://127.0.0.1:9")
    assert message.startswith("gateway east: ")
    assert "http://127.0.0.1:9" in message
    assert "`serve --api`" in message


SPOOL_WITHOUT_BOOKS = {"delivery_running": True, "destinations": [], "dead_letters": 0, "quarantined": 0}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(SPOOL_WITHOUT_BOOKS),
        Answer(SPOOL_WITHOUT_BOOKS | {"dead_letters": "0"}),
        Answer([]),
        Answer(b""),
        Answer(b"<html>"),
        Answer({}, status=404),
        Answer({"detail": f"no {SECRET} here"}, status=422),
        Answer({"detail": "the books cannot be used"}, status=503),
        Answer({}, status=302, headers={"location": "http://elsewhere.example"}),
        Answer(cut=True),
    ],
)
def test_an_answer_that_is_not_the_plugins_is_an_error_that_names_the_gateway(answer: Answer) -> None:
    with serving(lambda _: answer) as fake:
        assert failure(fake.url).startswith("gateway east: ")


@pytest.mark.parametrize("change", [{"delivery_running": "yes"}, {"dead_letters": "0"}, {"quarantined": -1}])
def test_a_value_of_another_type_is_an_error(there: Site, change: dict[str, object]) -> None:
    books = answered(there, "/v1/spool")
    with serving(lambda _: Answer(books | change)) as fake:
        assert next(iter(change)) in failure(fake.url)


def test_additional_fields_of_a_newer_plugin_are_ignored(gateway: Gateway, there: Site) -> None:
    newer = answered(there, "/v1/spool") | {"more": 1}
    newer["destinations"] = [part | {"more": {}} for part in newer["destinations"]]
    with serving(lambda _: Answer(newer)) as fake, gateway_at(fake.url) as other:
        assert other.spool().total.books == gateway.spool().total.books


def test_a_waiting_hour_on_only_one_page_is_returned() -> None:
    """Waiting events change between pages; an hour that has some on any page is not complete."""
    pages = {"": (FIRST, "more"), "more": (SECOND, None)}

    def answer(asked: Asked) -> Answer:
        hour, following = pages[asked.query.get("after", "")]
        waiting = [hour.strftime("%Y-%m-%dT%H")]
        return Answer({"lines": [], "hours_with_waiting_events": waiting, "next": following})

    with serving(answer) as fake, gateway_at(fake.url) as gateway:
        assert gateway.ledger(BEGINNING, END).hours_with_waiting_events == {FIRST, SECOND}


def test_a_ledger_that_never_ends_is_an_error() -> None:
    page = Answer({"lines": [], "hours_with_waiting_events": [], "next": "again"})
    with serving(lambda _: page) as fake, gateway_at(fake.url) as gateway:
        with pytest.raises(GatewayError, match="without anything new"):
            gateway.ledger(BEGINNING, END)
        assert len(fake.asked) == 1


def test_a_redelivery_is_requested_once_even_without_an_answer() -> None:
    with serving(lambda _: Answer(cut=True)) as fake:
        config = GatewayConfig(name="east", url=fake.url)
        with closing(Gateway(config, attempts=5)) as gateway, pytest.raises(GatewayError):
            gateway.redeliver(BEGINNING, END)
        assert len(fake.asked) == 1


def test_a_read_is_retried() -> None:
    answers = iter([Answer(cut=True), Answer(status=503), Answer({"dead_letters": [], "next": None})])
    with serving(lambda _: next(answers)) as fake:
        config = GatewayConfig(name="east", url=fake.url)
        with closing(Gateway(config, attempts=3, sleep=lambda _: None)) as gateway:
            assert gateway.dead_letters().next is None


# doctor


def doctor(deployment: Audited, **change: object) -> tuple[str, str]:
    """Return level and text of the only finding about the gateway."""
    (finding,) = findings(deployment, **change)
    return finding


def findings(deployment: Audited, **change: object) -> list[tuple[str, str]]:
    """Return level and text of each finding about the gateway."""
    deployment.gateways = [deployment.sites[0].settings | change]
    result = deployment.project().call("doctor", "--output=json")
    found = json.loads(result.stdout)
    return [(one["level"], one["text"]) for one in found if one["check"] == "gateway"]


def test_doctor_accepts_a_reachable_ready_gateway_with_the_right_token(
    deployment: Audited, tmp_path: Path
) -> None:
    httpx.delete(f"{deployment.metering.url}/sandbox/v1/faults").raise_for_status()
    with site(tmp_path, "west", deployment.metering.url) as west:
        west.serve("alice", FIRST, 1)
        level, text = doctor(deployment, name="west", url=west.url)
    assert (level, text) == ("ok", "west: ready, and the token is valid; no event waits for its delivery")


def test_doctor_reports_a_gateway_that_cannot_be_read(deployment: Audited) -> None:
    level, text = doctor(deployment, token=SECRET)
    assert level == "problem"
    assert "gateways[0].token" in text
    assert SECRET not in text
    assert doctor(deployment, url="http://127.0.0.1:9")[0] == "problem"


def test_doctor_reports_a_gateway_that_is_not_ready(deployment: Audited, there: Site) -> None:
    books = answered(there, "/v1/spool")

    def not_ready(asked: Asked) -> Answer:
        problem = {"ready": False, "problems": ["the disk is full"]}
        return Answer(problem, status=503) if asked.path == "/readyz" else Answer(books)

    with serving(not_ready) as fake:
        level, text = doctor(deployment, url=fake.url)
    assert (level, text) == ("problem", "east: its plugin is not ready: the disk is full")


def test_doctor_warns_of_a_gateway_whose_events_go_to_another_host(
    deployment: Audited, tmp_path: Path
) -> None:
    with site(tmp_path, "west", "http://127.0.0.1:9") as west:
        west.serve("alice", FIRST, 1, settled=False)
        (level, text), _ = findings(deployment, name="west", url=west.url)
        assert level == "warning"
        assert "metering_hosts" in text
        # Nothing listens there, so the event waits.
        ((_, waiting),) = findings(deployment, name="west", url=west.url, metering_hosts=["127.0.0.1:9"])
        assert "1 event waits for its delivery" in waiting


def test_doctor_warns_of_refused_events(deployment: Audited) -> None:
    level, text = doctor(deployment)
    assert level == "warning"
    assert "1 event was refused" in text


# Settings


def test_the_gateways_of_the_configuration_keep_their_order_and_settings(deployment: Audited) -> None:
    from syncd.config.settings import load

    deployment.gateways = [
        {"name": "b", "url": "https://b.example:8096/", "timeout": "3s"},
        {"name": "a", "url": "unix:/run/openmeter/api", "token": SECRET},
    ]
    config = load(deployment.project().config)
    assert [(one.name, one.config.url) for one in gateways_of(config)] == [
        ("b", "https://b.example:8096"),
        ("a", "unix:/run/openmeter/api"),
    ]
    assert config.gateways[0].timeout == timedelta(seconds=3)
    assert SECRET not in repr(config) + config.model_dump_json()


@pytest.mark.parametrize(
    ("answer", "asks"), [(Answer({}, 503), False), (Answer({}, 429), False), (Answer(cut=True), True)]
)
def test_only_without_an_answer_is_it_asked_whether_the_plugin_is_running(answer: Answer, asks: bool) -> None:
    with (
        serving(lambda _: answer) as fake,
        gateway_at(fake.url) as gateway,
        pytest.raises(GatewayError) as error,
    ):
        gateway.spool()
    assert ("Is the plugin running there" in str(error.value)) is asks
