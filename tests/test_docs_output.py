"""Output that the documentation shows is what the commands print, figures and all, but for the time of day.

Those of `openmeter-plugin spool` are compared by tests/plugin/api/test_operations_page.py, the demo's
table by
test_readme.py, a plan by tests/syncd/cli/test_plan_text.py, what is marked as printed by test_docs.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmeter_plugin.api.access import TOKEN_VARIABLE
from openmeter_plugin.spool.destination import write_destination
from syncd.sandbox.testing import running_sandbox
from tests.documents import PAGES, ROOT, blocks
from tests.harness.process import eventually, plugin_server
from tests.newcomer import report
from tests.plugin.deliveries import record, run_until_empty, spooled
from tests.plugin.events_server import Answer, EventsServer, serving
from tests.plugin.operations_api import ADMIN_TOKEN, address_of
from tests.plugin.spools import destination
from tests.syncd import audits
from tests.syncd.audits import HOUR, Audited, hours_ago
from tests.syncd.close.worlds import ALICE, MONTH, world

pytestmark = pytest.mark.slow

SHOWN = "2026-11-22T07"
"""The hour of the documentation's examples."""


def consoles(page: str) -> list[tuple[str, list[str]]]:
    """Return what is typed in the consoles of a page, and the lines below each."""
    return [
        (typed, printed)
        for block in blocks(page, "console")
        for typed, *printed in (one.splitlines() for one in block.text.removeprefix("$ ").split("\n$ "))
    ]


def test_every_console_is_compared_by_a_test() -> None:
    typed = [(page, console.split()) for page in PAGES for console, _ in consoles(page)]
    assert {(page, *words[:2]) for page, words in typed if words[0] != "curl"} == {
        ("docs/plugin-operations.md", "openmeter-plugin", "spool"),
        ("docs/audit.md", "syncd", "audit"),
        ("docs/howto/month-end.md", "syncd", "close"),
    }
    assert [page for page, words in typed if words[0] == "curl"] == ["docs/plugin-operations.md"]


def test_every_text_is_a_picture_or_compared_by_a_test() -> None:
    texts = [block for page in PAGES for block in blocks(page, "text") if not block.printed]
    pictures = [block.page for block in texts if re.search(r"-->|--\+", block.text)]
    assert pictures == ["README.md", "docs/concepts.md"]
    others = [(block.page, block.text.rstrip().splitlines()[-1]) for block in texts]
    others = [
        (page, last) for page, last in others if re.search(r"counted exactly once|in all|^Plan: ", last)
    ]
    assert [page for page, _ in others] == ["README.md", "docs/quickstart.md", "docs/syncd.md"]
    assert len(others) + len(pictures) == len(texts)


def moved(text: str, hour: datetime) -> str:
    """Return a text of the documentation's hour about another one."""
    for shown, actual in (("07", hour), ("08", hour + HOUR)):
        text = text.replace(f"2026-11-22T{shown}", actual.strftime("%Y-%m-%dT%H"))
        text = text.replace(f"2026-11-22 {shown}", actual.strftime("%Y-%m-%d %H"))
    return text


def test_an_audit_prints_what_the_page_shows(tmp_path: Path) -> None:
    ((typed, shown),) = consoles("docs/audit.md")
    hour = hours_ago(2)
    with ExitStack() as stack:
        metering = stack.enter_context(audits.metering(tmp_path))
        sites = [stack.enter_context(audits.site(tmp_path, name, metering.url)) for name in ("east", "west")]
        for site, requests in zip(sites, (6, 4), strict=True):
            site.serve("alice", hour, requests)
        metering.lose("alice", hour, 3)
        project = Audited(tmp_path, metering, sites).project()
        result = project.call(*shlex.split(moved(typed, hour))[1:], "--settle", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [moved(line, hour) for line in shown]


def test_the_ledger_answers_what_the_page_shows(tmp_path: Path) -> None:
    typed, shown = next(one for one in consoles("docs/plugin-operations.md") if one[0].startswith("curl"))
    spool, at = tmp_path / "spool", f"{SHOWN}:00:00.000Z"
    with serving(EventsServer()) as events:
        write_destination(spool, destination(events.url))
        spooled(spool, [record(1, 2, time=at, subject="consumer:bob")])
        run_until_empty(spool)
        events.script = lambda _: Answer(503)
        spooled(spool, [record(3, time=at, subject="consumer:alice")])
        with plugin_server(
            tmp_path, "--api", "127.0.0.1:0", environment={TOKEN_VARIABLE: ADMIN_TOKEN}
        ) as server:
            command = typed.replace("http://127.0.0.1:8096", address_of(server))

            def answer() -> Any:
                done = subprocess.run(
                    ["bash", "-c", command.replace("curl ", "curl --fail --silent --show-error ", 1)],
                    env=os.environ | {"TOKEN": ADMIN_TOKEN},
                    capture_output=True,
                    text=True,
                    timeout=30,
                )
                assert done.returncode == 0, done.stderr
                return json.loads(done.stdout)

            expected = json.loads("".join(shown))
            eventually(lambda: len(answer()["lines"]) == len(expected["lines"]), what="both subjects")
            assert answer() == expected


def test_the_seconds_that_a_newcomer_needs_are_shown_as_they_are_printed() -> None:
    (block,) = (block for block in blocks("docs/quickstart.md", "text") if "in all" in block.text)
    lines = [(line[:12].strip(), float(line[12:-2])) for line in block.text.splitlines()]
    *steps, (_, total) = lines
    assert report(steps).splitlines()[:-1] == block.text.splitlines()[:-1]
    assert abs(sum(seconds for _, seconds in steps) - total) < 0.06 * len(lines)  # each figure is rounded
    readme = (ROOT / "README.md").read_text()
    assert f"[{total} s](docs/quickstart.md#in-one-command), {dict(steps)['make setup']} of them" in readme


def test_what_stands_against_closing_a_month_is_as_the_page_says(tmp_path: Path) -> None:
    ((command, expected),) = consoles("docs/howto/month-end.md")
    with (
        running_sandbox() as url,
        httpx.Client(base_url=url) as sandbox,
        world(tmp_path / "world", sandbox, "eu") as there,
    ):
        there.serve(ALICE, 4633)
        there.spend(ALICE, 812_400)
        there.serve("stranger", 12)
        there.serve(ALICE, 1, counted=False)
        status, out, _ = there.call(str(MONTH))
    assert status == 2
    assert command == "syncd close 2026-10"
    assert out.replace(str(MONTH), "2026-10").splitlines() == expected
