"""Reports of ranges of days that are kept ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

import yaml

from syncd.config import settings
from syncd.config.settings import Config
from syncd.customers.directory import Directory
from syncd.metering.base import GroupedValue
from syncd.metering.usage import REQUESTS_METER
from syncd.state.database import State
from syncd.state.location import StateLocation
from syncd.usage.days import Days, chosen, month_before
from syncd.usage.report import Reports
from syncd.usage.store import Refresh, UsageStore
from tests.harness.process import eventually

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
TODAY = NOW.date()
THIS_MONTH = chosen(None, None, None, TODAY)


class CountingStore(UsageStore):
    """A store that counts how often usage is read by subject, as each new report does."""

    reads = 0

    def by_subject(self, meter: str, days: Days, subjects: Collection[str] | None = None) -> dict[str, float]:
        self.reads += 1
        return super().by_subject(meter, days, subjects)


def refreshed(store: UsageStore, day: date, value: float) -> None:
    store.keep_meter(REQUESTS_METER, [])
    store.replace_day(REQUESTS_METER, day, [GroupedValue("alice", (), value)], value, NOW, late=False)
    store.note_refresh(Refresh(NOW, NOW, 1, 0))


def configured(folder: Path) -> Config:
    path = folder / "syncd.yaml"
    path.write_text(
        yaml.safe_dump({"sources": [{"type": "static", "subjects": []}], "metering": {"url": "http://m"}})
    )
    return settings.load(path)


@contextmanager
def working(reports: Reports, config: Callable[[], Config]) -> Iterator[None]:
    """Have a thread keep the reports ready."""
    stopping = threading.Event()
    thread = threading.Thread(target=reports.work, args=(config, stopping, lambda: NOW, 0.01))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def test_reports_of_this_and_the_last_month_are_ready_after_each_refresh(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with State(StateLocation(tmp_path / "state")) as state:
        store = CountingStore(state)
        reports = Reports(store, Directory(state))
        refreshed(store, TODAY, 3.0)
        with working(reports, lambda: config):
            for number, value in enumerate((3.0, 5.0), 1):
                if number > 1:
                    refreshed(store, TODAY, value)
                expected = number * 4  # two reports, each with the period before

                def ready(expected: int = expected) -> bool:
                    return store.reads == expected

                eventually(ready, what="the reports")
                for days in (THIS_MONTH, month_before(TODAY)):
                    report = reports.report(days, config)
                    assert report.figures.total(0).now == (value if days is THIS_MONTH else 0)
                assert ready()


def test_a_report_that_crashes_is_followed_by_the_next(tmp_path: Path) -> None:
    config = configured(tmp_path)
    crashes = iter([ZeroDivisionError(), OSError(28, "no space left")])

    def read() -> Config:
        for error in crashes:
            raise error
        return config

    with State(StateLocation(tmp_path / "state")) as state:
        store = CountingStore(state)
        refreshed(store, TODAY, 3.0)
        with working(Reports(store, Directory(state)), read):
            eventually(lambda: store.reads == 4, what="the reports")
