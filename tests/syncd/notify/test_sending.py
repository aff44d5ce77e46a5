"""Sending through Apprise: bounded in time, and without a secret in any text."""

from __future__ import annotations

import threading
import time

import pytest

from syncd.notify.sending import Failure, secrets_of, send
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow


def apprise_url(url: str, path: str = "hook") -> str:
    return f"json://{url.removeprefix('http://')}/{path}"


def test_a_message_reaches_every_url() -> None:
    with serving(lambda _: Answer({})) as one, serving(lambda _: Answer({})) as other:
        assert send([apprise_url(one.url), apprise_url(other.url)], "the title", "line 1\nline 2", 20) == []
        for server in (one, other):
            (asked,) = server.asked
            assert isinstance(asked.body, dict)
            assert (asked.body["title"], asked.body["message"]) == ("the title", "line 1\nline 2")


def test_a_url_that_fails_is_named_without_its_secrets() -> None:
    secret = "token-0123456789"
    with serving(lambda _: Answer({}, 403)) as refusing, serving(lambda _: Answer({})) as fine:
        urls = [
            apprise_url(refusing.url, secret),
            apprise_url(fine.url),
            f"nosuch://{secret}",
            f"json://user:{secret}@127.0.0.1:9/{secret}",
        ]
        failures = send(urls, "t", "b", 20)
    assert [(one.index, one.name) for one in failures] == [
        (0, "notify.urls[0] (json)"),
        (2, "notify.urls[2] (nosuch)"),
        (3, "notify.urls[3] (json)"),
    ]
    assert "403" in failures[0].reason
    assert "does not know this kind" in failures[1].reason
    assert failures[2].reason
    assert secret not in str(failures)


def test_a_service_that_hangs_costs_the_time_limit_and_no_more() -> None:
    release = threading.Event()

    def hang(_: Asked) -> Answer:
        release.wait(30)
        return Answer({})

    with serving(hang) as hanging, serving(lambda _: Answer({})) as fine:
        began = time.monotonic()
        urls = [apprise_url(fine.url), apprise_url(hanging.url) + "?rto=60"]
        failures = send(urls, "t", "b", 8)
        took = time.monotonic() - began
        release.set()
    assert failures == [Failure(1, "notify.urls[1] (json)", "no answer within 8 s")]
    assert took < 20
    assert len(fine.asked) == 1


def test_a_stop_ends_the_wait() -> None:
    release, stopping = threading.Event(), threading.Event()

    def hang(_: Asked) -> Answer:
        stopping.set()
        release.wait(30)
        return Answer({})

    with serving(hang) as hanging:
        began = time.monotonic()
        assert send([apprise_url(hanging.url) + "?rto=60"], "t", "b", 60, stopping)
        assert time.monotonic() - began < 20
        release.set()


def test_all_parts_of_a_url_are_secrets() -> None:
    assert secrets_of("slack://T12345678/B1/xoxb-secret?x=hidden") == [
        "T12345678/B1/xoxb-secret?x=hidden",
        "T12345678",
        "xoxb-secret",
        "hidden",
    ]
