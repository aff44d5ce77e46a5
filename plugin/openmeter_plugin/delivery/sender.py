"""Having events taken: sent until the metering API has them, but for those that it will never take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from openmeter_plugin.delivery.books import DeadLetter
from openmeter_plugin.delivery.client import RejectedError
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.log import get_logger


class Sender:
    """Sends one queue's events through its endpoint."""

    def __init__(self, queue: str, endpoint: Endpoint, max_age: timedelta | None = None) -> None:
        self._endpoint = endpoint
        self._max_age = max_age
        self._log = get_logger().bind(queue=queue)

    async def send(
        self, events: Sequence[bytes], *, expiring: bool = False, on_its_way: Callable[[], None] | None = None
    ) -> list[DeadLetter]:
        """Have the events taken, all but those that never will be: they are returned as dead letters.

        A batch is not atomic: what comes before a bad event is taken although the answer is an error.
        Sending it again does no harm, since the metering API knows the ids. With `expiring`, events that
        have become too old are dead letters too. `on_its_way` is called when a POST's body is written.
        """
        dead: list[DeadLetter] = []
        while True:
            if expiring:
                events, expired = self._split_expired(events)
                dead += expired
            if not events:
                return dead
            try:
                if await self._endpoint.attempt(events, on_its_way):
                    return dead
            except RejectedError as rejection:
                single = _one_by_one(events)
                if len(single) == 1:
                    self._log.error("dead_letter", status=rejection.status, answer=str(rejection)[:300])
                    return [*dead, DeadLetter(single[0], rejection.status, str(rejection))]
                middle = len(single) // 2
                dead += await self.send(single[:middle], expiring=expiring)
                events = single[middle:]

    def _split_expired(self, events: Sequence[bytes]) -> tuple[Sequence[bytes], list[DeadLetter]]:
        """Part the events from those that are too old to be sent, where there is an age limit."""
        if self._max_age is None or not events:
            return events, []
        oldest = (datetime.now(UTC) - self._max_age).strftime("%Y-%m-%dT%H:%M:%S")
        parsed = _parsed(events)
        if all(str(event.get("time")) >= oldest for event in parsed):
            return events, []
        answer = f"not delivered within {self._max_age}, the configured age limit"
        young = [orjson.dumps(event) for event in parsed if str(event.get("time")) >= oldest]
        old = [orjson.dumps(event) for event in parsed if str(event.get("time")) < oldest]
        return young, [DeadLetter(event, None, answer) for event in old]


def _parsed(events: Sequence[bytes]) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(events) + b"]")
    return parsed


def _one_by_one(events: Sequence[bytes]) -> list[bytes]:
    """Return the events one by one; a request's events come joined out of the spool."""
    return [orjson.dumps(event) for event in _parsed(events)]
