"""The metering API as a process that ends and comes back, behind a real Kong: `outage` in short."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.plugin.gate import outage
from tests.plugin.gate.gateway import PATHS
from tests.plugin.gate.test_real_kong import WAITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kong") is None, reason="there is no kong on the PATH"),
]
LEFT = 1_000
"""More than the few seconds of an outage can use."""


@pytest.mark.parametrize(("on_stale", "then"), [("allow", [200]), ("deny", [503])])
def test_while_the_metering_api_is_away_no_request_waits_and_all_that_passed_is_billed_once_it_is_back(
    tmp_path: Path, on_stale: str, then: list[int]
) -> None:
    seen = outage.run(tmp_path, 16, LEFT, lambda _: None, max_stale=10, on_stale=on_stale)
    assert seen.failures == []
    assert seen.slowest < WAITS
    for shell in PATHS:
        spent = [status for _, status in seen.answers[f"{shell} spent"]]
        assert spent[-3:] == [429, *then, 429]
        payer = [status for _, status in seen.answers[f"{shell} payer"]]
        assert payer[-2:] == ([200] if on_stale == "allow" else [503, 200])
    assert seen.billed == seen.passed


def test_a_customer_uses_up_what_is_left_to_the_last_request_while_the_metering_api_is_away(
    tmp_path: Path,
) -> None:
    seen = outage.run(tmp_path, 12, 15, lambda _: None, max_stale=600, on_stale="deny")
    assert seen.failures == []
    assert seen.passed["tight"] == 15
    assert {seen.answers[f"{shell} tight"][-1][1] for shell in PATHS} == {429}
    assert seen.billed == seen.passed
