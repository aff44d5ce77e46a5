"""Times on the command line."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import typer

from syncd.cli.options import moment
from syncd.metering.usage import rfc3339


def test_a_day_is_its_first_moment_in_utc() -> None:
    assert moment("2026-11-01") == datetime(2026, 11, 1, tzinfo=UTC)
    assert rfc3339(moment("2026-11-01")) == "2026-11-01T00:00:00Z"


def test_a_time_of_another_zone_is_sent_in_utc() -> None:
    assert rfc3339(moment("2026-11-01T00:30:00.9+01:00")) == "2026-10-31T23:30:00Z"


@pytest.mark.parametrize("text", ["2026-11", "2026-02-30", "2026-11-01T07:00:00", "yesterday", "1"])
def test_a_text_that_could_mean_several_times_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"must be a time|needs a time zone"):
        moment(text)
