"""The thread that looks at runs and gateways and sends what is new.

It takes no part in a run: a run only wakes it. Whatever it meets (a gateway that hangs, a service that does
not answer, a full disk) ends in a log line, and is tried again later, each time after a longer pause.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog

from syncd.config.sections import GatewayConfig, NotifyConfig, next_times
from syncd.config.settings import Config
from syncd.core.errors import GatewayError, StateError, SyncdError
from syncd.gateways.client import Gateway
from syncd.notify import conditions
from syncd.notify.conditions import Condition, Key, Message, Observed
from syncd.notify.sending import send, target_name
from syncd.notify.store import Notices
from syncd.runs.clock import Now, utc_now
from syncd.runs.history import History
from syncd.runs.queue import RunQueue
from syncd.runs.run import Run, RunObserver
from syncd.usage.days import Days
from syncd.usage.report import Report, Reports

_log = structlog.get_logger("syncd.notify")

_LOOK_SECONDS = 60.0
_LONGEST_PAUSE = 3600.0
_GATEWAY_TIMEOUT = timedelta(seconds=5)
_ATTEMPTS = 10
"""How often a URL is tried that failed while another one took the message."""
_MAX_OWED = 100
_WEEK = timedelta(days=7)
_PAGE = 500


class Waker(RunObserver):
    """Wakes the thread at the end of each run."""

    def __init__(self) -> None:
        self.woken = threading.Event()

    def finished(self, run: Run) -> None:  # noqa: ARG002 - as all observers are called
        """Wake it."""
        self.woken.set()


@dataclass(slots=True)
class _Owed:
    """A message that one URL has not taken yet, while another one has."""

    url: str
    message: Message
    attempts: int = 1


class Watch:
    """Looks and sends; `work` is the body of its thread."""

    def __init__(
        self,
        runs: RunQueue,
        history: History,
        notices: Notices,
        config: Callable[[], Config],
        waker: Waker,
        stopping: threading.Event,
        now: Now = utc_now,
        leads: Callable[[], bool] = lambda: True,
        reports: Reports | None = None,
    ) -> None:
        self._leads = leads
        self._reports = reports
        self._runs = runs
        self._history = history
        self._notices = notices
        self._config = config
        self._waker = waker
        self._stopping = stopping
        self._now = now
        self._silent_since: dict[str, float] = {}
        self._owed: list[_Owed] = []
        self._unkept: dict[Key, Condition] = {}
        self._summarized: datetime | None = None
        self._pause = 0.0
        self._not_before = 0.0

    def work(self) -> None:
        """Look after each run and every minute, until stopped."""
        while not self._stopping.is_set():
            try:
                self.look()
            except SyncdError as error:
                _log.warning("notifications_failed", error=str(error))
            except Exception:
                _log.exception("notifications_crashed")
            self._waker.woken.wait(_LOOK_SECONDS)
            # Before `stopping` is looked at again, which `stop` follows: a stop is never missed.
            self._waker.woken.clear()

    def stop(self) -> None:
        """End the wait; `stopping` is set before."""
        self._waker.woken.set()

    def look(self) -> None:
        """Send what is new, unless no URL is set or the services failed a moment ago."""
        config = self._config()
        settings = config.notify
        if not settings.urls or not self._leads() or time.monotonic() < self._not_before:
            return
        observed = self.observe(config)
        sent = self._notices.sent() | {key: one.figure for key, one in self._unkept.items()}
        self._keep(conditions.fallen(observed, sent), conditions.over(observed, sent))
        self._pay_owed(settings)
        public_url = config.daemon.public_url
        for message in conditions.messages(observed, sent, settings, config.owner_id, public_url):
            if self._send(settings, message):
                self._keep(message.conditions)
        self._send_summary(config, observed)

    def _keep(self, sent: Sequence[Condition], over: Sequence[Key] = ()) -> None:
        """Note what was sent and what is over; while the state takes nothing, this process remembers it."""
        self._unkept |= {(one.topic, one.key): one for one in sent}
        for key in over:
            self._unkept.pop(key, None)
        if not (over or self._unkept):
            return
        try:
            self._notices.end(over)
            self._notices.keep(self._unkept.values(), self._now())
        except StateError as error:
            consequence = "a restart of syncd would send the same again"
            _log.warning("notifications_not_kept", error=str(error), consequence=consequence)
        else:
            self._unkept.clear()

    def observe(self, config: Config) -> Observed:
        """Return what holds now; a gateway that hangs takes some seconds."""
        observed = Observed()
        recent = self._runs.recent()
        planned = next((run for run in recent if run.plan is not None and run.options.scope.whole), None)
        conditions.of_runs(observed, self._runs.last_real(), planned, config.notify)
        for index, gateway in enumerate(config.gateways):
            if self._stopping.is_set():
                break
            self._observe_gateway(observed, gateway, index, config.notify.gateway_lag)
        return observed

    def _observe_gateway(
        self, observed: Observed, gateway: GatewayConfig, index: int, lag: timedelta
    ) -> None:
        timeout = min(gateway.timeout, _GATEWAY_TIMEOUT)
        try:
            with closing(Gateway(gateway.model_copy(update={"timeout": timeout}), index, attempts=1)) as api:
                conditions.of_gateway(observed, gateway.name, api.readiness(), api.spool(), lag)
        except GatewayError as error:
            since = self._silent_since.setdefault(gateway.name, time.monotonic())
            silent = timedelta(seconds=time.monotonic() - since)
            conditions.of_silent_gateway(observed, gateway.name, str(error), silent, lag)
        else:
            self._silent_since.pop(gateway.name, None)

    def _send_summary(self, config: Config, observed: Observed) -> None:
        cron, now = config.notify.summary, self._now()
        if cron is None:
            return
        known = filter(None, (self._notices.last_summary(), self._summarized))
        last = max(known, default=None)
        if last is None:
            self._notices.keep_summary(now)
        elif next_times(cron, last, 1)[0] <= now:
            runs = self._runs_since((now - _WEEK).isoformat())
            usage = self._usage_of_week(now, config)
            url = config.daemon.public_url
            message = conditions.summary(runs, observed, config.owner_id, now, url, usage)
            if self._send(config.notify, message):
                self._summarized = now
                self._notices.keep_summary(now)

    def _usage_of_week(self, now: datetime, config: Config) -> Report | None:
        """Return the usage of the last seven whole days, compared with the seven before them."""
        today = now.date()
        week, before = Days(today - _WEEK, today), Days(today - 2 * _WEEK, today - _WEEK)
        return self._reports.report(week, config, before) if self._reports else None

    def _runs_since(self, since: str) -> Iterator[Mapping[str, Any]]:
        """Yield the runs of the history since a time, latest first, a page at a time."""
        offset = 0
        while page := self._history.runs(_PAGE, offset):
            for run in page:
                if str(run["requested_at"]) < since:
                    return
                yield run
            offset += _PAGE

    def _send(self, settings: NotifyConfig, message: Message) -> bool:
        """Return whether one URL at least has taken a message; the others are tried again."""
        if self._stopping.is_set() or time.monotonic() < self._not_before:
            return False
        urls = [url.get_secret_value() for url in settings.urls]
        failures = send(urls, message.title, message.body, settings.timeout.total_seconds(), self._stopping)
        if self._stopping.is_set() and failures:
            return False
        for failure in failures:
            _log.warning(
                "notification_failed", target=failure.name, reason=failure.reason, title=message.title
            )
        if len(failures) == len(urls):
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause or _LOOK_SECONDS)
            self._not_before = time.monotonic() + self._pause
            return False
        self._pause = 0.0
        self._owed += [_Owed(urls[failure.index], message) for failure in failures]
        del self._owed[:-_MAX_OWED]
        _log.info("notification_sent", title=message.title, conditions=len(message.conditions))
        return True

    def _pay_owed(self, settings: NotifyConfig) -> None:
        """Try the URLs again that failed while others took a message."""
        known = {url.get_secret_value(): index for index, url in enumerate(settings.urls)}
        owed, self._owed = self._owed, []
        for one in owed:
            if one.url not in known or self._stopping.is_set():
                continue
            timeout = settings.timeout.total_seconds()
            failures = send([one.url], one.message.title, one.message.body, timeout, self._stopping)
            if failures and one.attempts < _ATTEMPTS:
                self._owed.append(_Owed(one.url, one.message, one.attempts + 1))
            elif failures:
                target = target_name(known[one.url], one.url)
                _log.error("notification_given_up", target=target, title=one.message.title)
