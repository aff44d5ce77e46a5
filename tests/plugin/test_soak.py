"""A round of each kind of trouble; `make soak` runs a hundred with other seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.round import Trouble, run_round

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trouble", list(Trouble), ids=lambda trouble: trouble.name.lower())
def test_what_was_acknowledged_is_billed_once_whatever_is_killed_while_the_metering_api(
    tmp_path: Path, trouble: Trouble
) -> None:
    report = run_round(tmp_path, seed=list(Trouble).index(trouble), trouble=trouble, requests=2_500, kills=3)
    assert report.acknowledged + report.given_up_by_kong == report.driven
