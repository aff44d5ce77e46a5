"""The pages of dead letters: what they show, and replays from them, also of a real plugin server."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import orjson
import pytest

from tests.harness.process import eventually
from tests.plugin.deliveries import record, rejects, spooled
from tests.plugin.events_server import take_all
from tests.plugin.operations_api import ADMIN_TOKEN, Api, api
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway, replay
from tests.syncd.dashboard.support import Visitor, form_token, site, text_of
from tests.syncd.dashboard.test_pages import looking_at, row
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

PROBLEM = orjson.dumps({"title": "Bad Request", "status": 400, "detail": "subject is missing"}).decode()
LETTERS = "/dashboard/dead-letters"


def problem_letter(number: int, **fields: object) -> dict[str, object]:
    return dead_letter(number, PROBLEM, title="Bad Request", detail="subject is missing", **fields)


def forms(page: str) -> list[dict[str, str]]:
    """The hidden fields of each form that replays."""
    found = re.findall(
        r'<form method="post" action="/dashboard/dead-letters/[^"]*replay".*?</form>', page, re.DOTALL
    )
    return [dict(re.findall(r'name="(\w+)" value="([^"]*)"', form)) for form in found]


def test_dead_letters_are_grouped_by_the_answer_in_words(project: Project) -> None:
    letters = [problem_letter(n) for n in (1, 2)] + [dead_letter(3, "older than 2 days", status=None)]
    letters[1] |= {"to_be_replayed": True}
    with looking_at(project, FakeGateway(dead=letters)) as visitor:
        page = visitor.see(LETTERS)
        assert "eu 3 dead letters" in text_of(page)
        assert "HTTP 400 Bad Request subject is missing View 2 events 2" in row(page, "HTTP 400")
        assert "1 waiting Replay Sends 1 event" in row(page, "HTTP 400")
        assert "too old older than 2 days View 1 event 1" in row(page, "too old")
        assert "Replay all of eu" in page
        assert "{" not in text_of(page), "no raw problem document"
        everything = [form for form in forms(page) if "all" in form]
        assert [form["up_to"] for form in everything] == ["3"], "what comes later is not replayed unseen"
        group = next(form["group"] for form in forms(page) if "group" in form)
        listed = visitor.see(f"{LETTERS}/eu", group=group)
        assert "Only those with one answer" in listed
        assert "HTTP 400" in listed
        assert "too old" not in listed


def test_dead_letters_are_listed_in_pages(project: Project) -> None:
    letters = [dead_letter(number, f"answer {number}") for number in range(1, 61)]
    letters[0] |= {"status": None, "detail": "older than --max-age"}
    letters[1] |= {"to_be_replayed": True}
    with looking_at(project, FakeGateway(dead=letters)) as visitor:
        assert f'href="{LETTERS}"' in visitor.see("/dashboard/gateways")
        first = visitor.see(f"{LETTERS}/eu")
        assert "too old older than --max-age" in row(first, "1")
        assert "will be replayed" in row(first, "2")
        assert "HTTP 400 answer 50" in row(first, "50")
        assert "event-000051" not in first
        second = visitor.see(f"{LETTERS}/eu", after="50")
        assert "answer 60" in second
        assert 'rel="next"' not in second
        assert visitor.client.get(f"{LETTERS}/nobody").status_code == 404


def test_one_dead_letter_is_shown_with_its_event_and_the_whole_answer(project: Project) -> None:
    event = {"specversion": "1.0", "data": {"route_name": "orders", "status": "200"}}
    with looking_at(project, FakeGateway(dead=[problem_letter(5)], event=event)) as visitor:
        page = visitor.see(f"{LETTERS}/eu/5")
        assert "Bad Request subject is missing" in text_of(page)
        assert "&#34;route_name&#34;: &#34;orders&#34;" in page
        assert "Whole answer" in page
        assert forms(page)[0]["id"] == "5"
        assert "Cannot be read" in visitor.see(f"{LETTERS}/eu/6")
        for path in (f"{LETTERS}/nobody/5", f"{LETTERS}/nobody/replays/1"):
            assert visitor.client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"id": "5"}, {"ids": [5]}),
        ({"group": "0123456789abcdef", "up_to": "9"}, {"group": "0123456789abcdef", "up_to": 9}),
        ({"all": "yes", "up_to": "9"}, {"all": True, "up_to": 9}),
    ],
)
def test_a_form_replays_what_it_names(
    project: Project, fields: dict[str, str], asked: dict[str, object]
) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay(7, delivered=1, refused=1, waiting=0))
    with looking_at(project, fake) as visitor:
        answer = visitor.send(f"{LETTERS}/eu/replay", LETTERS, **fields)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{LETTERS}/eu/replays/7")
        assert fake.replays == [asked]
        page = text_of(visitor.see(f"{LETTERS}/eu/replays/7"))
        assert "1 event was refused again" in page
        assert "Replayed 2 Delivered 1 Refused again 1 Waiting 0" in page


@pytest.mark.parametrize(
    "fields", [{}, {"group": "x"}, {"id": "0"}, {"id": "x"}, {"group": "", "up_to": "4"}]
)
def test_a_form_that_names_nothing_replays_nothing(project: Project, fields: dict[str, str]) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay())
    with looking_at(project, fake) as visitor:
        assert visitor.send(f"{LETTERS}/eu/replay", LETTERS, **fields).status_code == 400
        assert visitor.send(f"{LETTERS}/nobody/replay", LETTERS, all="yes").status_code == 404
        assert fake.replays == []


def test_a_replay_needs_a_form_of_the_same_visitor(project: Project) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay())
    with gateway(fake) as there, site(project, extra=configured(eu=there.url)) as found:
        with found.operator() as one, found.operator() as other:
            forged = {"form_token": other.form_token(), "all": "yes"}
            assert one.client.post(f"{LETTERS}/eu/replay", data=forged).status_code == 403
            assert one.client.post(f"{LETTERS}/eu/replay", data={"all": "yes"}).status_code == 403
        with found.visitor() as stranger:
            answer = stranger.client.post(f"{LETTERS}/eu/replay", data={"all": "yes"})
            assert answer.headers["location"] == "/dashboard/login"
        assert fake.replays == []


def test_a_replay_in_progress_refreshes_until_it_is_over(project: Project) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay(7))
    with looking_at(project, fake) as visitor:
        page = visitor.see(f"{LETTERS}/eu/replays/7")
        assert 'http-equiv="refresh"' in page
        assert "2 events are waiting for an answer" in text_of(page)
        assert 'http-equiv="refresh"' not in visitor.see(f"{LETTERS}/eu/replays/7", live="off")
        fake.replay = replay(7, delivered=2, waiting=0)
        page = visitor.see(f"{LETTERS}/eu/replays/7")
        assert "Every event was delivered" in page
        assert 'http-equiv="refresh"' not in page


def test_nothing_to_replay_is_said(project: Project) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay() | {"id": None, "marked": 0})
    with looking_at(project, fake) as visitor:
        answer = visitor.send(f"{LETTERS}/eu/replay", LETTERS, all="yes")
        assert answer.status_code == 409
        assert "wait for a replay already" in answer.text


def test_what_a_replay_changed_is_seen_at_once(project: Project) -> None:
    fake = FakeGateway(dead=[dead_letter(5)], replay=replay(delivered=2, waiting=0))
    with looking_at(project, fake) as visitor:
        assert "1 dead letter" in visitor.see(LETTERS)
        fake.dead.clear()
        assert "1 dead letter" in visitor.see(LETTERS), "read a moment ago"
        visitor.send(f"{LETTERS}/eu/replay", LETTERS, all="yes")
        assert "Every event was delivered or is waiting" in visitor.see(LETTERS)


def test_a_gateway_that_fails_or_hangs_ends_in_a_page_that_says_what_holds(project: Project) -> None:
    release = threading.Event()

    def hang(asked: Asked) -> Answer:
        if asked.path.endswith("/replay"):
            release.wait(30)
        return Answer(status=503)

    with serving(hang) as there, site(project, extra=configured(eu=there.url)) as found:
        with found.operator() as visitor:
            assert "Cannot be read" in visitor.see(LETTERS)
            token = form_token(visitor.see())
            began = time.monotonic()
            form = {"form_token": token, "all": "yes"}
            answer = visitor.client.post(f"{LETTERS}/eu/replay", data=form)
            took = time.monotonic() - began
            assert answer.status_code == 502
            assert "none is sent twice" in text_of(answer.text)
            assert took < 10
            assert there.paths().count("POST /v1/dead-letters/replay") == 1, "asked once"
        release.set()


def seen(visitor: Visitor, place: str) -> bool:
    return "Every event was delivered" in visitor.see(place)


@contextmanager
def real_gateway(project: Project, folder: Path, letters: int) -> Iterator[tuple[Visitor, Api]]:
    """An operator, and a real plugin server with so many dead letters in addition to its own one."""
    with api(folder) as running:
        refused = {f"event-{n:06d}" for n in range(100, 100 + letters)}
        running.events.script = rejects(refused | {"event-000003"})
        spooled(running.server.spool, [record(n) for n in range(100, 100 + letters)])

        def dead() -> int:
            return int(running.get("/v1/spool")["total"]["books"]["dead_lettered"])

        eventually(lambda: dead() == letters + 1, what="the dead letters", seconds=30)
        setting = configured(eu=running.url).replace("token-of-the-gateway-s-api", ADMIN_TOKEN)
        with site(project, extra=setting) as found, found.operator() as visitor:
            yield visitor, running


@pytest.mark.slow
def test_dead_letters_of_a_real_gateway_are_replayed_once_however_often_the_form_is_sent(
    project: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    folder.mkdir()
    with real_gateway(project, folder, letters=20) as (visitor, running):
        page = visitor.see(LETTERS)
        assert "HTTP 400 Bad Request" in text_of(page)
        (form,) = forms(page)
        assert form["group"]
        running.events.script = take_all
        before = running.events.came.copy()
        answers: list[int] = []
        places: list[str] = []

        def send() -> None:
            answer = visitor.client.post(f"{LETTERS}/eu/replay", data=form)
            answers.append(answer.status_code)
            places.extend(filter(None, [answer.headers.get("location")]))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(answers) <= {303, 409}
        assert 303 in answers
        for place in places:
            eventually(partial(seen, visitor, place), what=place)
        wanted = Counter([f"event-{n:06d}" for n in (3, *range(100, 120))])
        assert running.events.came - before == wanted, "each once"
        assert "Every event was delivered or is waiting" in visitor.see(LETTERS)
