from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from syncd.core.errors import RefusedError, UnauthorizedError, UnreachableError
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from tests.syncd.servers import Answer, Asked, Server, serving


def client(server: Server, waits: list[float], attempts: int = 3) -> ApiClient:
    endpoint = Endpoint("metering", server.url, "metering.token", "do it", token="s3cr3t")
    return ApiClient(endpoint, Retry(attempts=attempts, first_wait=1, sleep=waits.append))


def answers(*script: Answer) -> Callable[[Asked], Answer]:
    left = list(script)
    return lambda _asked: left.pop(0)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_transient_failure_is_retried(status: int) -> None:
    waits: list[float] = []
    with serving(answers(Answer(status=status), Answer({"ok": 1}))) as server, client(server, waits) as api:
        assert api.get("/x") == {"ok": 1}
    assert len(waits) == 1


def test_the_wait_grows_and_has_jitter() -> None:
    waits: list[float] = []
    with (
        serving(answers(*[Answer(status=500)] * 4)) as server,
        client(server, waits, attempts=4) as api,
        pytest.raises(UnreachableError, match="tried 4 times"),
    ):
        api.get("/x")
    for wait, full in zip(waits, (1, 2, 4), strict=True):
        assert full / 2 <= wait <= full


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: "7", 7, 8.1),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True), 28, 31.1),
        (lambda: "86400", 60, 61.1),
        (lambda: "soon", 0, 1),
    ],
)
def test_retry_after_is_obeyed_up_to_a_minute(header: Callable[[], str], least: float, most: float) -> None:
    waits: list[float] = []
    limited = Answer(status=429, headers={"Retry-After": header()})
    with serving(answers(limited, Answer({}))) as server, client(server, waits) as api:
        api.get("/x")
    assert least - 0.1 <= waits[0] <= most


def test_a_refusal_is_not_retried_and_carries_the_servers_explanation() -> None:
    problem = Answer({"title": "Bad Request", "detail": "name is too long"}, 400)
    with (
        serving(answers(problem)) as server,
        client(server, []) as api,
        pytest.raises(RefusedError) as caught,
    ):
        api.request("POST", "/x", body={})
    assert (caught.value.status, caught.value.detail) == (400, "name is too long")
    assert len(server.asked) == 1


def test_a_request_that_must_not_be_repeated_is_sent_once() -> None:
    with (
        serving(answers(Answer(status=503))) as server,
        client(server, []) as api,
        pytest.raises(UnreachableError),
    ):
        api.request("PUT", "/x", body={}, repeat=False)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_an_authentication_problem_names_the_setting_and_the_rights_and_not_the_token(status: int) -> None:
    with (
        serving(answers(Answer({"detail": "no"}, status))) as server,
        client(server, []) as api,
        pytest.raises(UnauthorizedError) as caught,
    ):
        api.get("/x")
    assert "metering.token" in str(caught.value)
    assert "do it" in str(caught.value)
    assert server.asked[0].headers["authorization"] == "Bearer s3cr3t"
    assert "s3cr3t" not in str(caught.value)


def test_a_retry_after_outlasts_the_request_that_gave_up() -> None:
    waits: list[float] = []
    limited = Answer(status=429, headers={"Retry-After": "7"})
    with serving(answers(limited, Answer({}))) as server, client(server, waits, attempts=1) as api:
        with pytest.raises(UnreachableError):
            api.get("/x")
        assert api.get("/x") == {}
    assert [round(wait) for wait in waits] == [7]
