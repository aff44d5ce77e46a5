"""The daemon's look at closed months: compares them with the meters every hour, for metrics and the page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from syncd.close.closing import Closing
from syncd.close.store import ClosedMonth
from syncd.core.errors import StoppedError, SyncdError

_log = structlog.get_logger("syncd.close")

EVERY_SECONDS = 3600.0
STANDBY_SECONDS = 60.0
"""Time after which a daemon that may not check looks again whether it may."""


@dataclass(frozen=True, slots=True)
class LateWatch:
    """Checks closed months until `stopping` is set; `closing` is called for each check.

    `report` receives all closed months after each check that succeeded.
    """

    closing: Callable[[], Closing]
    report: Callable[[Sequence[ClosedMonth]], object]
    stopping: threading.Event
    may_check: Callable[[], bool] = lambda: True
    every: float = EVERY_SECONDS
    standby: float = STANDBY_SECONDS

    def work(self) -> None:
        """Check at once, and again each time that `every` seconds have passed, while it may."""
        while not self.stopping.is_set():
            may_check = self.may_check()
            if may_check:
                self.check()
            self.stopping.wait(self.every if may_check else self.standby)

    def check(self) -> None:
        """Check once; a failure is logged, and the state keeps what the last check found."""
        try:
            found = self.closing().check()
        except StoppedError:
            return
        except SyncdError as error:
            _log.warning("late_check_failed", error=str(error))
            return
        except Exception:
            _log.exception("late_check_failed")
            return
        for one in found:
            if one.late:
                _log.warning(
                    "late_usage",
                    month=str(one.month),
                    subjects=len(one.late),
                    requests=one.late_requests,
                    tokens=one.late_tokens,
                )
        self.report(found)
