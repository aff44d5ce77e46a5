"""Figures that several pages quote are those of docs/benchmarks.md, which names the command behind each."""

from __future__ import annotations

import re

import pytest

from tests.documents import ROOT

BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()


def measured(pattern: str) -> str:
    """Return the group of a pattern that docs/benchmarks.md has once."""
    found = re.findall(pattern, BENCHMARKS)
    assert len(found) == 1, (pattern, found)
    return str(found[0])


LUA = measured(r"\| the plugin in Lua \| (\d+ to \d+ µs) \|")
HTTP_LOG = measured(r"\| `http-log` \| (\d+ to \d+ µs) \|")
SERVER = measured(r"\| the plugin server \| (\d+ to \d+ µs) \|")
TOTAL = f"{LUA.split()[0]} to {SERVER.split(' to ')[1]}"
THOUSANDS = measured(r"\| events/s \| (\d+),\d+ \|")
MEMORY = measured(r"\| memory \(PSS of all processes\) \| (\d+ MiB);")
PLANNED = measured(r"`syncd plan` of 100,000 consumers uses at most (\d+ MiB)")
DRAINED = measured(r"\| draining a backlog \| ([\d,]+) events/s;")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        *(
            (page, f"| {cost}")
            for page in ("README.md", "docs/lua-plugin.md")
            for cost in (LUA, HTTP_LOG, SERVER)
        ),
        (
            "plugin/openmeter_plugin/lua/handler.lua",
            f"this plugin {LUA.removesuffix(' µs')} (docs/benchmarks.md)",
        ),
        ("CHANGELOG.md", f"It costs Kong {LUA} a request"),
        ("README.md", f"about {LUA.split(' to ')[1]} of [CPU time]"),
        ("docs/plugin.md", f"{SERVER} per request"),
        ("docs/plugin.md", f"costs {HTTP_LOG},"),
        ("docs/plugin.md", f"the plugin in Lua](lua-plugin.md) {LUA}"),
        ("docs/is-it-for-you.md", f"{TOTAL} of Kong's CPU time"),
        ("docs/plugin.md", f"about {THOUSANDS},000 events/s"),
        ("plugin/openmeter_plugin/cli/main.py", f"One handles about {THOUSANDS},000 events/s."),
        ("docs/plugin.md", f"about {MEMORY} for all processes"),
        ("docs/is-it-for-you.md", f"(about {MEMORY})"),
        ("docs/syncd.md", f"in {PLANNED} of memory"),
        ("docs/scale.md", f"| 7.2 s | {PLANNED} |"),
        ("docs/decisions/no-orm.md", f"{DRAINED} events/s"),
        ("docs/decisions/segment-spool.md", f"{DRAINED} events/s"),
    ],
)
def test_a_figure_is_the_same_on_every_page(page: str, text: str) -> None:
    assert text in (ROOT / page).read_text()


@pytest.mark.parametrize("cost", [HTTP_LOG, SERVER])
def test_a_range_of_costs_is_what_the_tables_show_to_five_microseconds(cost: str) -> None:
    row = next(line for line in BENCHMARKS.splitlines() if f"| {cost} |" in line)
    pairs = [(int(more), int(less)) for more, less in re.findall(r"\((\d+) - (\d+)\)", row)]
    pages = BENCHMARKS + (ROOT / "docs" / "decisions" / "two-inputs.md").read_text()
    for figure in (figure for pair in pairs for figure in pair):
        assert re.search(rf"\| {figure} [µu]s \|", pages), figure
    low, high = (int(end) for end in cost.removesuffix(" µs").split(" to "))
    costs = sorted(more - less for more, less in pairs)
    assert costs == [pytest.approx(low, abs=2.5), pytest.approx(high, abs=2.5)]
