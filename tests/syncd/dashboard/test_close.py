"""The page of closed months, over HTTP from a real daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from syncd.close.report import Month
from syncd.config import settings
from syncd.daemon.service import running
from syncd.dashboard.close import months_of
from tests.syncd.close.worlds import ALICE, MONTH, World, world
from tests.syncd.dashboard.support import Visitor, text_of
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def there(tmp_path: Path, sandbox: httpx.Client) -> Iterator[World]:
    with world(tmp_path / "world", sandbox, "eu") as found:
        text = found.project.config.read_text()
        found.project.config.write_text(
            text.replace("{state_dir: state}", "{state_dir: state, listen: '127.0.0.1:0'}")
        )
        found.serve(ALICE, 5)
        yield found


@contextmanager
def daemon(there: World) -> Iterator[httpx.Client]:
    with (
        running(settings.load(there.project.config)) as found,
        httpx.Client(base_url=found.address.url, timeout=20) as client,
    ):
        yield client


def rows(page: str) -> dict[str, str]:
    found = re.findall(r"<tr>\s*<th scope=\"row\">(.*?)</th>(.*?)</tr>", page, re.DOTALL)
    return {text_of(head): text_of(rest) for head, rest in found}


def test_a_closed_month_has_a_tick_and_its_report_as_files(there: World) -> None:
    with daemon(there) as client:
        visitor = Visitor(client)
        before = visitor.see("/dashboard/close")
        assert rows(before)[str(MONTH)] == f"not closed no syncd close {MONTH} none"
        assert client.get(f"/dashboard/close/{MONTH}.html").status_code == 404
        assert there.call(str(MONTH), "--by", "mia")[0] == 0
        page = visitor.see("/dashboard/close")
        assert "✓ closed" in rows(page)[str(MONTH)]
        assert "by mia" in rows(page)[str(MONTH)]
        for kind in ("html", "csv", "json"):
            assert f'href="/dashboard/close/{MONTH}.{kind}"' in page
            got = client.get(f"/dashboard/close/{MONTH}.{kind}")
            assert got.headers["content-disposition"].startswith(f'attachment; filename="close-{MONTH}-')
            assert got.content.decode() == there.call(str(MONTH), "-o", kind)[1], "as the command prints it"
        for path in (f"{MONTH}.exe", "1999-01.html", "x", "..%2f..%2fetc.html"):
            assert client.get(f"/dashboard/close/{path}").status_code == 404


def test_what_arrives_for_a_closed_month_is_on_the_page_and_in_the_metrics(there: World) -> None:
    assert there.call(str(MONTH))[0] == 0
    there.serve(ALICE, 2)
    with daemon(there) as client:

        def late() -> bool:
            return f'syncd_late_requests{{month="{MONTH}"}} 2.0' in client.get("/metrics").text

        eventually(late, what="the first check of the daemon")
        page = Visitor(client).see("/dashboard/close")
        assert "closed, changed since" in rows(page)[str(MONTH)]
        assert rows(page)[ALICE] == "acme +2 0"
        assert "--again" in page


def test_a_metering_api_that_is_away_leaves_what_the_last_check_found(there: World) -> None:
    assert there.call(str(MONTH))[0] == 0
    there.serve(ALICE, 2)
    assert there.call()[0] == 2
    there.sandbox.post("/sandbox/v1/faults", json={"status": 503}).raise_for_status()
    with daemon(there) as client:
        assert rows(Visitor(client).see("/dashboard/close"))[ALICE] == "acme +2 0"
        assert "syncd_late_requests{" not in client.get("/metrics").text, "nothing is known to this daemon"


@pytest.mark.parametrize(
    ("now", "latest"),
    [((2026, 11, 1, 0, 59), "2026-09"), ((2026, 11, 1, 1, 0), "2026-10"), ((2027, 1, 1, 1, 0), "2026-12")],
)
def test_the_months_that_can_be_closed_are_listed(now: tuple[int, int, int, int, int], latest: str) -> None:
    found = months_of(datetime(*now, tzinfo=UTC), {})
    assert (str(found[0]), len(found)) == (latest, 13)
    assert len(set(found)) == 13


def test_a_closed_month_of_long_ago_stays_on_the_list() -> None:
    old = Month(2020, 1)
    found = months_of(datetime(2026, 11, 2, tzinfo=UTC), {old: None})  # type: ignore[dict-item]
    assert found[-1] == old
