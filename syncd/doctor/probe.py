"""The probe of deduplication: sends one event twice and counts how often it is stored.

The second copy goes out only after the first has arrived and the sink has flushed. OpenMeter's sink drops
doubles within one flush (openmeter/sink: at most `minCommitCount` events or `maxCommitWait`, 2 s by
default) whether its `dedupe` is configured or not, so two copies at once are stored once by any server.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from syncd.core.errors import ApiError
from syncd.doctor.checks import Finding, Level
from syncd.metering.base import MeteringApi

PROBE_TYPE = "kong-openmeter.doctor"
"""The type of the events that the probe sends; no standard meter counts it."""
FLUSH_SECONDS = 6.0
_ARRIVAL_SECONDS = 60.0
_LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Probe:
    """`flush` is how long, in seconds, the sink may collect events before it stores them."""

    flush: float = FLUSH_SECONDS

    def check(self, api: MeteringApi) -> Finding:
        """Send the event, wait until it is stored, send it again after a flush, and count."""
        try:
            return self._finding(api)
        except ApiError as error:
            return Finding("deduplication", Level.PROBLEM, f"the probe failed: {error}")

    def _finding(self, api: MeteringApi) -> Finding:
        event = _event()
        identity = str(event["id"])
        began = time.monotonic()
        api.send_event(event)
        if not _becomes(lambda: api.count_events(identity) > 0, _ARRIVAL_SECONDS):
            text = (
                f"the probe {identity} has not arrived after {_ARRIVAL_SECONDS:.0f} s. Check the sink worker"
            )
            return Finding("deduplication", Level.WARNING, text)
        arrival = time.monotonic() - began
        time.sleep(self.flush)
        api.send_event(event)
        # The second copy may take as long as the first, and a flush more.
        if _becomes(lambda: api.count_events(identity) > 1, arrival + self.flush):
            text = (
                "an event that was sent twice is stored twice, so every retry of a delivery is billed again."
                " Configure the sink's `dedupe` (not the ingest side's, which loses retried events)"
            )
            return Finding("deduplication", Level.PROBLEM, text)
        return Finding("deduplication", Level.OK, "an event that was sent twice is stored once")


def _event() -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": f"doctor-{uuid.uuid4().hex}",
        "source": "syncd",
        "type": PROBE_TYPE,
        "subject": "syncd-doctor",
        "time": datetime.now(UTC).isoformat(),
    }


def _becomes(holds: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition becomes true in time; it is looked at once more at the end."""
    deadline = time.monotonic() + seconds
    while not holds():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(_LOOK_SECONDS, left))
    return True
