"""Who may refuse events: the metering API alone, by an error document of its own; and how one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openmeter_plugin.delivery.answers import Answer as Received
from openmeter_plugin.delivery.answers import RejectedError, UndeliveredError, failure_of
from openmeter_plugin.spool.destination import write_destination
from tests.harness.books import read_dead_letters
from tests.harness.process import eventually
from tests.plugin.deliveries import delivered, delivering, event, ids, record, run_until_empty, spooled
from tests.plugin.events_server import Answer, EventsServer, Post, refusal, serving
from tests.plugin.spools import destination
from tests.syncd.contract.recordings import Exchange, exchanges

REFUSED = [
    exchange
    for file in ("v1-events", "v3-events", "as-sent-by-plugin-v1", "as-sent-by-plugin-v3")
    for exchange in exchanges(file)
    if exchange.status >= 400
]
NGINX = (
    "<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>\r\n"
    "<body>\r\n<center><h1>400 Bad Request</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n"
    "</html>\r\n"
)
OTHERS = {
    "a load balancer's page": Answer(400, NGINX, {"content-type": "text/html"}),
    "a page without a type": Answer(400, NGINX),
    "nothing": Answer(400),
    "text": Answer(422, "no", {"content-type": "text/plain"}),
    "a gateway's JSON": Answer(400, '{"message":"Bad request"}', {"content-type": "application/json"}),
    "JSON that is no object": Answer(400, '["no"]', {"content-type": "application/problem+json"}),
    "JSON cut off": Answer(400, '{"status":400,"ti', {"content-type": "application/problem+json"}),
    "JSON of another status": Answer(400, '{"status":500,"title":"x"}', {"content-type": "application/json"}),
    "a page with status 200": Answer(200, "<html>It works!</html>", {"content-type": "text/html"}, taken=0),
}


@pytest.mark.parametrize("exchange", REFUSED, ids=str)
def test_a_real_servers_refusal_condemns(exchange: Exchange) -> None:
    headers = {name.lower().encode(): value.encode() for name, value in exchange.answer_headers.items()}
    error = failure_of(Received(exchange.status, headers, json.dumps(exchange.answer).encode()), [])
    assert isinstance(error, RejectedError)
    assert not error.only_too_large
    assert "urn:request" not in str(error)


@pytest.mark.parametrize(
    ("file", "name", "named"),
    [
        ("v1-events", "batch-one-bad-in-the-middle", [1]),
        ("v1-events", "batch-bad-first", [0]),
        ("v3-events", "batch-one-bad-in-the-middle", [1]),
        ("v3-events", "batch-bad-first", [0]),
        ("v1-events", "source-no-uri", []),
        ("v1-events", "no-subject", []),
        ("v3-events", "no-subject", []),
    ],
)
def test_a_real_server_names_the_invalid_event_by_its_position(
    file: str, name: str, named: list[int]
) -> None:
    (exchange,) = (found for found in exchanges(file) if found.name == name)
    headers = {name.lower().encode(): value.encode() for name, value in exchange.answer_headers.items()}
    error = failure_of(Received(exchange.status, headers, json.dumps(exchange.answer).encode()), [])
    assert isinstance(error, RejectedError)
    assert error.named == named


@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS)
def test_an_answer_that_is_not_the_apis_is_an_outage_and_condemns_nothing(
    tmp_path: Path, answer: Answer
) -> None:
    answers = [answer] * 5
    with serving(EventsServer(lambda _: answers.pop() if answers else Answer())) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        run_until_empty(tmp_path)
    assert [post.ids for post in server.posts] == [ids(range(10))] * 6
    assert read_dead_letters(tmp_path) == []
    assert server.taken == ids(range(10))


def test_a_batch_too_large_for_a_proxy_is_split_but_no_event_is_condemned(tmp_path: Path) -> None:
    limit = [700]

    def script(post: Post) -> Answer:
        page = Answer(413, "<html>413 Request Entity Too Large</html>", {"content-type": "text/html"})
        return page if len(post.body) > limit[0] else Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n, pad="x" * (1000 if n == 3 else 100)) for n in range(6)])
        with delivering(tmp_path):
            eventually(lambda: [post for post in server.posts if len(post.events) == 1], what="the search")
            eventually(lambda: "event-000002" in server.taken, what="the others' delivery")
            limit[0] = 10_000
            eventually(lambda: delivered(tmp_path) == 6, what="delivery")
    assert sorted(server.taken) == ids(range(6))
    assert read_dead_letters(tmp_path) == []


def naming(bad: set[str], status: int = 400) -> EventsServer:
    """Refuse batches as OpenMeter v1 does: the first invalid event is named, nothing is stored."""

    def script(post: Post) -> Answer:
        for position, event_id in enumerate(post.ids):
            if event_id in bad:
                fault = f'request body has an error: doesn\'t match schema: Error at "/{position}/subject": x'
                return refusal(status, fault)
        return Answer()

    return EventsServer(script)


def test_a_named_event_is_found_without_a_search(tmp_path: Path) -> None:
    with serving(naming({"event-000123", "event-000377"})) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(500)])
        run_until_empty(tmp_path)
    assert [len(post.events) for post in server.posts] == [500, 1, 499, 1, 498]
    letters = [letter for *_, letter in read_dead_letters(tmp_path)]
    assert [letter.event for letter in letters] == [event(123), event(377)]
    assert delivered(tmp_path) == 498


def test_a_position_that_names_the_wrong_event_condemns_only_what_is_refused_alone(tmp_path: Path) -> None:
    def script(post: Post) -> Answer:
        return refusal(400, 'Error at "/0/subject": x') if "event-000007" in post.ids else Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(10)])
        run_until_empty(tmp_path)
    assert [letter.event for *_, letter in read_dead_letters(tmp_path)] == [event(7)]
    assert sorted(server.taken) == ids(range(7), range(8, 10))


def test_a_position_outside_the_batch_names_nobody(tmp_path: Path) -> None:
    def script(post: Post) -> Answer:
        return refusal(400, 'Error at "/77/subject": x') if "event-000002" in post.ids else Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(4)])
        run_until_empty(tmp_path)
    assert [letter.event for *_, letter in read_dead_letters(tmp_path)] == [event(2)]


def test_a_page_says_what_is_wrong(tmp_path: Path) -> None:
    error = failure_of(Received(400, {b"content-type": b"text/html"}, NGINX.encode()), [])
    assert isinstance(error, UndeliveredError)
    assert error.endpoint_fails
    assert "not the metering API's (text/html)" in str(error)
    assert "sent to HTTPS port" in str(error)
