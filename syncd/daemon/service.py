"""``syncd run``: runs at start, on schedule and on request, never two at once.

A stop waits `_STOP_SECONDS` at most. What is still under way then is a request that has no answer, and the
process ends without it, as if it had been killed: the next run reads what it did.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from openmeter_plugin.process.systemd import Notifier
from openmeter_plugin.process.web_server import EmbeddedServer, limited_protocol
from syncd.close.closing import Closing, LateWatch
from syncd.close.store import ClosedMonths
from syncd.config.settings import Config
from syncd.config.types import Listen, listening
from syncd.core.errors import ConfigError, QueueFullError, StateError
from syncd.customers.directory import Directory
from syncd.daemon.api import Daemon, create_app
from syncd.daemon.leadership import Leadership
from syncd.daemon.metrics import Metrics
from syncd.daemon.schedule import Schedule
from syncd.dashboard.session import IDLE
from syncd.notify.store import Notices
from syncd.notify.watch import Waker, Watch
from syncd.runs.clock import Now, utc_now
from syncd.runs.factory import rules_of
from syncd.runs.history import DirectoryRecorder, History, HistoryRecorder
from syncd.runs.ignored import IgnoredSubjects
from syncd.runs.queue import SCHEDULE, ReportedOutcomes, RunQueue
from syncd.runs.reconciler import Reconciler, record_end
from syncd.runs.run import Run, RunState
from syncd.sources.base import Readings
from syncd.state.database import State
from syncd.usage.refresh import Refresher
from syncd.usage.report import Reports
from syncd.usage.store import UsageStore

_log = structlog.get_logger("syncd.daemon.service")

_LOCK_TIMEOUT = 300.0
_NEEDS_RESTART = ("listen", "state_dir", "state_url")
_STOP_SECONDS = 3.0
"""How long a stop waits for requests under way: service managers kill after 10 s, Docker's default."""
_USAGE_WAIT = 20.0
"""Seconds before the first refresh of usage: the run at the start goes first."""
_MAX_CONNECTIONS = 64
_HEAD_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 30


def run_until_signalled(config: Config, load: Callable[[], Config]) -> None:
    """Run the daemon until SIGTERM or SIGINT, which stop it between two changes; raises DaemonError.

    SIGHUP reloads the configuration with `load`. A second signal to stop ends the wait for requests. The
    service manager, if there is one, is notified of the start, reloads and the stop.
    """
    notifier = Notifier()
    running_daemon: RunningDaemon | None = None
    stops = 0

    def on_signal(number: int, _frame: object) -> None:
        nonlocal stops
        stops += number != signal.SIGHUP
        if stops > 1 and running_daemon is not None:
            running_daemon.patience = 0.0

    with _caught(on_signal) as numbers, running(config) as daemon:
        running_daemon = daemon
        notifier.ready()
        while numbers.recv(1)[0] == signal.SIGHUP and not stops:
            notifier.reloading()
            daemon.reload(load)
            notifier.ready()
        notifier.stopping()
        daemon.stopping.set()
        _log.info("stopping")
    if daemon.unfinished:
        # Python would wait for the threads of these requests before it exits.
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _caught(handler: Callable[[int, object], None]) -> Iterator[socket.socket]:
    """Catch the signals; yields a socket from which the number of each can be read, a byte long.

    The kernel's handler writes to the socket at once. A wait for a lock, such as that of a threading.Event,
    misses a signal that comes right before it blocks, until the next one: once in some 2,000 signals.
    """
    before = {
        number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, previous in before.items():
                signal.signal(number, previous)


class RunningDaemon:
    """A running daemon: its address, and its configuration, which `reload` replaces between two runs."""

    usage: Refresher

    def __init__(
        self,
        config: Config,
        address: Listen,
        metrics: Metrics,
        stopping: threading.Event,
        schedule: Schedule,
        leadership: Leadership,
    ) -> None:
        self.address = address
        self.stopping = stopping
        self.config = config
        self.readings = Readings()
        self.metrics = metrics
        self.patience = _STOP_SECONDS
        self.unfinished: tuple[str, ...] = ()
        """After a stop: the threads that still wait for an answer."""
        self._schedule = schedule
        self._leadership = leadership
        self._refused: str | None = None

    def wait_for(self, threads: Sequence[threading.Thread]) -> None:
        """Wait until the threads have ended, `patience` seconds at most; the others are `unfinished`."""
        begun = time.monotonic()
        for thread in threads:
            while thread.is_alive() and time.monotonic() - begun < self.patience:
                thread.join(0.05)
        self.unfinished = tuple(thread.name for thread in threads if thread.is_alive())
        if self.unfinished:
            _log.warning("stopped_without_answer", waiting=self.unfinished)

    def reload(self, load: Callable[[], Config]) -> None:
        """Switch to the configuration that `load` returns; if it is invalid, keep the old one."""
        try:
            config = load()
            self._require_token(config)
            rules_of(config)
            config.notify.check()
        except ConfigError as error:
            self._refused = str(error)
            self.metrics.config_current.set(0)
            _log.error("configuration_refused", error=str(error), in_use="previous configuration")
            return
        fixed = {name: getattr(self.config.daemon, name) for name in _NEEDS_RESTART}
        if any(getattr(config.daemon, name) != value for name, value in fixed.items()):
            _log.warning("restart_required", settings=[f"daemon.{name}" for name in _NEEDS_RESTART])
        if config.schedule != self.config.schedule:
            self._schedule.change(config.schedule)
        self.config = config.model_copy(update={"daemon": config.daemon.model_copy(update=fixed)})
        self.readings = Readings()
        self._refused = None
        self.metrics.config_current.set(1)
        _log.info("configuration_reloaded")

    def _require_token(self, config: Config) -> None:
        """Raise ConfigError if the address, which stays until a restart, would be open without a token."""
        if config.daemon.token is None and not self.config.daemon.listen.is_loopback:
            raise ConfigError(
                "daemon.token must stay set (SYNCD_DAEMON__TOKEN) until a restart: the daemon still listens"
                f" on {self.config.daemon.listen}, which is not a loopback address"
            )

    def token(self) -> str | None:
        """Return the token that the API requires."""
        token = self.config.daemon.token
        return token.get_secret_value() if token else None

    def describe(self) -> dict[str, object]:
        """Return the schedule and the state of the configuration, for GET /v1/status."""
        next_run = self._schedule.next_run().isoformat() if self._leadership.leads() else None
        return {
            "next_run": next_run,
            "configuration_refused": self._refused,
            **self._leadership.describe(),
        }


@contextmanager
def running(
    config: Config,
    now: Now = utc_now,
    *,
    clock_check_seconds: float = 20.0,
    session_idle: float = IDLE,
    usage_wait: float = _USAGE_WAIT,
) -> Iterator[RunningDaemon]:
    """Run the daemon in threads of this process; its `address` is the one it actually listens on.

    `now` is this machine's clock; the schedule looks at it every `clock_check_seconds`. A session of the
    dashboard ends after `session_idle` seconds without a request. Usage is refreshed for the first time after
    `usage_wait` seconds.
    """
    rules_of(config)  # an unreadable mapping file is an error now, not at the first run
    config.notify.check()
    stopping = threading.Event()
    with (
        listening(config.daemon.listen) as listener,
        State(config.daemon.state) as state,
    ):
        history, directory, kept_usage = History(state), Directory(state), UsageStore(state)
        metrics = Metrics()
        address = Listen(config.daemon.listen.host, listener.getsockname()[1])
        leadership = Leadership(state, stopping)
        schedule = Schedule(
            config.schedule, lambda: _request(runs, leadership), now, check_seconds=clock_check_seconds
        )
        daemon = RunningDaemon(config, address, metrics, stopping, schedule, leadership)
        daemon.usage = Refresher(
            kept_usage,
            lambda: daemon.config,
            now,
            stopping=stopping,
            may_refresh=leadership.leads,
        )
        reported, waker = ReportedOutcomes(), Waker()
        observers = (
            HistoryRecorder(history, lambda: daemon.config.daemon.keep_runs),
            DirectoryRecorder(directory),
            metrics,
            reported,
            waker,
        )

        def reconcile(run: Run, *, should_stop: Callable[[], bool], on_update: Callable[[Run], None]) -> Run:
            if not leadership.leads():
                return _not_led(run, on_update)
            # Built for each run, with the configuration and readings of this moment.
            reconciler = Reconciler(
                daemon.config,
                history,
                observers,
                readings=daemon.readings,
                holder="syncd run",
                patience=_LOCK_TIMEOUT,
                sleep=stopping.wait,
                now=now,
            )
            try:
                return reconciler.reconcile(run, should_stop=should_stop, on_update=on_update)
            finally:
                _end_request(leadership, run)

        runs = RunQueue(reconcile, stopping, shared=leadership.requests)
        leadership.requested = runs.enqueue
        leadership.elected = lambda: _request(runs, leadership)
        leadership.begin()
        reports = Reports(kept_usage, directory)
        watch = Watch(
            runs,
            history,
            Notices(state),
            lambda: daemon.config,
            waker,
            stopping,
            now,
            leadership.leads,
            reports,
        )
        months, ignored = ClosedMonths(state), IgnoredSubjects(state)
        late = LateWatch(
            lambda: Closing(
                daemon.config, months, ignored.active(), sleep=stopping.wait, should_stop=stopping.is_set
            ),
            metrics.closed_months,
            stopping,
            leadership.leads,
        )
        server = _server(
            Daemon(
                runs,
                history,
                metrics,
                lambda: daemon.config,
                daemon.token,
                daemon.describe,
                leadership,
                state,
                reports,
                session_idle,
            )
        )
        threads = [
            threading.Thread(target=server.run, args=([listener],), name="syncd-api", daemon=True),
            threading.Thread(target=runs.work, name="syncd-worker", daemon=True),
            threading.Thread(target=schedule.work, name="syncd-schedule", daemon=True),
            threading.Thread(target=daemon.usage.work, args=(usage_wait,), name="syncd-usage", daemon=True),
            threading.Thread(
                target=reports.work,
                args=(lambda: daemon.config, stopping, now),
                name="syncd-reports",
                daemon=True,
            ),
            threading.Thread(target=leadership.work, name="syncd-leadership", daemon=True),
            threading.Thread(target=late.work, name="syncd-late", daemon=True),
            threading.Thread(target=watch.work, name="syncd-notify", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            seconds = config.schedule.interval.total_seconds()
            _log.info(
                "listening", url=daemon.address.url, interval_seconds=seconds, cron=config.schedule.cron
            )
            yield daemon
        finally:
            schedule.stop()
            runs.stop()
            watch.stop()
            leadership.wake()
            server.end()
            daemon.wait_for(threads)
            if (abandoned := runs.abandon(reported.outcomes)) is not None:
                record_end(abandoned, observers)
            leadership.resign()


def _not_led(run: Run, on_update: Callable[[Run], None]) -> Run:
    """End a run that was queued before another daemon began to lead."""
    ended = replace(
        run,
        state=RunState.FAILED,
        finished_at=datetime.now(UTC),
        error="another syncd does the runs now (see the leader in `syncd status`); nothing was changed",
        failure="lock",
    )
    on_update(ended)
    return ended


def _end_request(leadership: Leadership, run: Run) -> None:
    if leadership.requests is None or run.trigger == SCHEDULE:
        return
    try:
        leadership.requests.end(run.id)
    except StateError as error:
        _log.warning("request_kept", error=str(error), consequence="the next leader may repeat this run")


def _request(runs: RunQueue, leadership: Leadership) -> None:
    if not leadership.leads():
        return
    try:
        runs.request(SCHEDULE)
    except QueueFullError as error:
        _log.warning("scheduled_run_skipped", error=str(error))


def _server(daemon: Daemon) -> EmbeddedServer:
    return EmbeddedServer(
        create_app(daemon),
        # Whoever reaches the port may not take the descriptors that runs need.
        http=limited_protocol(_HEAD_SECONDS, _MAX_CONNECTIONS),
        backlog=_MAX_CONNECTIONS,  # asyncio accepts as many at once, before the limit sees them
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )
