"""What the commands say when the daemon does not do what was asked of it."""

from __future__ import annotations

import pytest

from syncd.core.errors import DaemonError
from syncd.daemon.client import DaemonClient
from tests.syncd.servers import Answer, serving

RUNNING, RESTARTED = "Is `syncd run` running", "Was the daemon restarted"


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (Answer(cut=True), RUNNING),
        (Answer({"detail": "100 different runs are already queued"}, 429), None),
        (Answer({"detail": "the history cannot be used"}, 503), None),
        (Answer({"detail": "no such run"}, 404), RESTARTED),
        (Answer({"detail": "Extra inputs are not permitted"}, 422), None),
    ],
)
def test_the_advice_fits_the_answer(answer: Answer, advice: str | None) -> None:
    with serving(lambda _: answer) as server, pytest.raises(DaemonError) as error:
        DaemonClient(server.url, sleep=lambda _: None).get("a" * 32)
    assert [one for one in (RUNNING, RESTARTED) if one in str(error.value)] == ([advice] if advice else [])
