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


@dataclass(frozen=True, slots=True)
class LateWatch:
    """Checks closed months until `stopping` is set; `closing` is called for each check.

    `report` receives all closed months after each check that succeeded.
    """

    closing: Callable[[], Closing]
    report: Callable[[Sequence[ClosedMonth]], object]
    stopping: threading.Event
    every: float = EVERY_SECONDS

    def work(self) -> None:
        """Check at once, and again each time that `every` seconds have passed."""
        while not self.stopping.is_set():
            self.check()
            self.stopping.wait(self.every)

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
