"""The geometry of charts, and the SVG and table that the macros make of it."""

from __future__ import annotations

import re
from datetime import date

import jinja2
import pytest

from syncd.dashboard import web
from syncd.dashboard.charts import HEIGHT, WIDTH, Point, chart, per_day
from tests.syncd.dashboard.support import elements

DAYS = [Point("2026-11-01", 10, 20), Point("2026-11-02", 40, 0), Point("2026-11-03", 0, None)]


def drawn(points: list[Point]) -> str:
    environment = web.environment({"dashboard.css": b"", "icon.svg": b""})
    template: jinja2.Template = environment.from_string(
        '{% from "charts.html" import bars, share %}{{ bars(chart, "c", "requests") }}{{ share(0.375) }}'
    )
    return template.render(chart=chart("Requests per day", "requests", points))


def test_bars_stand_on_the_axis_and_are_in_proportion() -> None:
    found = chart("Requests", "requests", DAYS)
    assert found.top == 50
    assert [bar.height for bar in found.bars] == [HEIGHT * 0.2, HEIGHT * 0.8, 0]
    assert all(bar.y + bar.height == HEIGHT for bar in found.bars)
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH for bar in found.bars)


@pytest.mark.parametrize(
    ("highest", "top"), [(0, 1), (1, 1), (1.1, 2), (3, 5), (999, 1000), (2_100_000, 2_500_000), (0.03, 0.05)]
)
def test_the_scale_ends_at_a_round_number(highest: float, top: float) -> None:
    assert chart("", "", [Point("x", highest)]).top == pytest.approx(top)


def test_the_line_of_the_period_before_has_only_the_days_that_it_had() -> None:
    assert len(chart("", "", DAYS).line.split()) == 2
    assert not chart("", "", [Point("x", 1)]).compared


def test_a_long_range_puts_several_days_into_a_bar_and_loses_none() -> None:
    points = per_day(date(2026, 1, 1), [1.0] * 250, [2.0] * 250)
    assert len(points) == 84
    assert points[0].label == "2026-01-01 to 2026-01-03"
    assert points[-1].label == "2026-09-07"
    assert sum(point.value for point in points) == 250
    assert sum(point.before or 0 for point in points) == 500
    assert len(per_day(date(2026, 1, 1), [1.0] * 31, [])) == 31


def test_days_of_a_longer_period_before_that_have_no_counterpart_are_left_out() -> None:
    points = per_day(date(2026, 2, 1), [1.0] * 121, [1.0] * 123)
    assert sum(point.before or 0 for point in points) == 121


def test_a_chart_has_a_name_a_description_and_its_figures_as_a_table() -> None:
    page = drawn(DAYS)
    found = elements(page)
    (svg,) = [e for e in found.of("svg") if e.attributes.get("role") == "img"]
    ids = {element.attributes.get("id") for element in found.found}
    assert set((svg.attributes["aria-labelledby"] or "").split()) <= ids
    assert "50 requests in all; most on 2026-11-02: 40." in page
    rows = re.findall(
        r'<th scope="row">([\d-]+)</th><td class="num">(\d+)</td><td class="num">(\d*)</td>', page
    )
    assert rows == [("2026-11-01", "10", "20"), ("2026-11-02", "40", "0"), ("2026-11-03", "0", "")]
    assert "style=" not in page, "the content security policy forbids inline styles"
    assert 'width="37.5"' in page


def test_labels_from_outside_are_text() -> None:
    page = drawn([Point("<script>alert(1)</script>", 1)])
    assert "<script>" not in page


def test_an_empty_chart_says_so() -> None:
    assert "No requests." in drawn([])
