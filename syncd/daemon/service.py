"""``syncd run``: a run at the start, one each interval or by cron, more on request; never two at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
import uvicorn
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from syncd.apply.executor import Report
from syncd.config.run import ScheduleConfig
from syncd.config.settings import Config
from syncd.config.types import Listen, listening
from syncd.core.changes import Plan
from syncd.core.errors import ConfigError, QueueFullError
from syncd.daemon.api import Daemon, create_app
from syncd.daemon.metrics import Metrics
from syncd.runs import reconciler
from syncd.runs.clock import ClockJumpDetector, Now, utc_now
from syncd.runs.factory import rules_of
from syncd.runs.history import History, HistoryRecorder
from syncd.runs.lock import write_lock
from syncd.runs.queue import RunQueue
from syncd.runs.reconciler import Result, RunOptions
from syncd.sources.base import Readings

_log = structlog.get_logger("syncd.daemon.service")

_JOB = "sync"
_LOCK_PATIENCE = 300.0
_CLOCK_SECONDS = 5.0


def run_until_signalled(config: Config, load: Callable[[], Config]) -> None:
    """Run the daemon until SIGTERM or SIGINT, which stop it between two changes; raises DaemonError.

    SIGHUP has it `load` its configuration again.
    """
    woken, stop, reload = threading.Event(), threading.Event(), threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        (reload if number == signal.SIGHUP else stop).set()
        woken.set()

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        with running(config) as daemon:
            while not stop.is_set():
                woken.wait()
                woken.clear()
                if reload.is_set():
                    reload.clear()
                    daemon.reload(load)
            daemon.stopping.set()
            _log.info("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Running:
    """A daemon that runs: its address, and its configuration, which `reload` exchanges between two runs."""

    def __init__(self, config: Config, address: Listen, metrics: Metrics, stopping: threading.Event) -> None:
        self.address = address
        self.stopping = stopping
        self.config = config
        self.readings = Readings()
        self.metrics = metrics
        self._scheduler = BackgroundScheduler(timezone=UTC)
        self._refused: str | None = None

    def start(self, request: Callable[[], object]) -> None:
        """Begin with the schedule."""
        schedule(self._scheduler, request, self.config.schedule, datetime.now(UTC))
        self._scheduler.start()

    def on_clock_jump(self, jump: timedelta) -> None:
        """Have runs follow the clock: what is due by now is due, and none waits for a time long past.

        APScheduler would sleep on until the time that it chose before, which after a jump back is far off.
        """
        _log.warning("clock_jumped", seconds=round(jump.total_seconds()))
        if jump < timedelta(0):
            self._scheduler.reschedule_job(_JOB, trigger=trigger_of(self.config.schedule))
        else:
            self._scheduler.wakeup()

    def watch_clock(self, now: Now) -> None:
        """Look out for jumps of the clock until the daemon stops."""
        watch = ClockJumpDetector(now)
        while not self.stopping.wait(_CLOCK_SECONDS):
            if jump := watch.jumped():
                self.on_clock_jump(jump)

    def stop(self) -> None:
        """End the schedule."""
        if self._scheduler.running:
            self._scheduler.shutdown()

    def reload(self, load: Callable[[], Config]) -> None:
        """Take the configuration that `load` gives; a bad one is refused, and the old one stays."""
        try:
            config = load()
            self._require_token(config)
            rules_of(config)
        except ConfigError as error:
            self._refused = str(error)
            self.metrics.config_current.set(0)
            _log.error("configuration_refused", error=str(error), still="the configuration before")
            return
        fixed = {"listen": self.config.daemon.listen, "state_dir": self.config.daemon.state_dir}
        if any(getattr(config.daemon, name) != value for name, value in fixed.items()):
            _log.warning("restart_needed", settings="daemon.listen and daemon.state_dir stay until a restart")
        if config.schedule != self.config.schedule:
            self._scheduler.reschedule_job(_JOB, trigger=trigger_of(config.schedule))
        self.config = config.model_copy(update={"daemon": config.daemon.model_copy(update=fixed)})
        self.readings = Readings()
        self._refused = None
        self.metrics.config_current.set(1)
        _log.info("configuration_reloaded")

    def _require_token(self, config: Config) -> None:
        """Raise ConfigError where the address of before, which stays, would be open to everybody."""
        if config.daemon.token is None and not self.config.daemon.listen.is_loopback:
            raise ConfigError(
                "daemon.token must stay set (SYNCD_DAEMON__TOKEN) until a restart: the daemon still listens"
                f" on {self.config.daemon.listen}, which is not a loopback address"
            )

    def token(self) -> str | None:
        """Return the token that the API asks for."""
        token = self.config.daemon.token
        return token.get_secret_value() if token else None

    def describe(self) -> dict[str, object]:
        """Return the schedule and the state of the configuration, for GET /v1/status."""
        job = self._scheduler.get_job(_JOB)
        due = job.next_run_time.isoformat() if job and job.next_run_time else None
        return {"next_run": due, "configuration_refused": self._refused}


@contextmanager
def running(config: Config, now: Now = utc_now) -> Iterator[Running]:
    """Run the daemon in threads of this process; its `address` is the one that it really listens on.

    `now` is this machine's clock.
    """
    rules_of(config)  # a mapping file that cannot be read is an error now, not at the first run
    stopping = threading.Event()
    with (
        listening(config.daemon.listen) as listener,
        closing(History(config.daemon.state_dir)) as history,
    ):
        metrics = Metrics()
        daemon = Running(
            config, Listen(config.daemon.listen.host, listener.getsockname()[1]), metrics, stopping
        )
        perform = Performer(lambda: daemon.config, lambda: daemon.readings, history, stopping.wait, now)
        observers = (HistoryRecorder(history, lambda: daemon.config.daemon.keep_runs), metrics)
        runs = RunQueue(perform, stopping, observers=observers)
        server = _server(Daemon(runs, history, metrics, lambda: daemon.config, daemon.token, daemon.describe))
        threads = [
            threading.Thread(target=server.run, args=([listener],), name="syncd-api"),
            threading.Thread(target=runs.work, name="syncd-worker"),
            threading.Thread(target=daemon.watch_clock, args=(now,), name="syncd-clock"),
        ]
        for thread in threads:
            thread.start()
        try:
            daemon.start(lambda: _request(runs))
            seconds = config.schedule.interval.total_seconds()
            _log.info(
                "listening", url=daemon.address.url, interval_seconds=seconds, cron=config.schedule.cron
            )
            yield daemon
        finally:
            daemon.stop()
            runs.stop()
            server.should_exit = True
            for thread in threads:
                thread.join()


def _request(runs: RunQueue) -> None:
    try:
        runs.request("schedule")
    except QueueFullError as error:
        _log.warning("schedule_skipped", error=str(error))


def _server(daemon: Daemon) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            create_app(daemon),
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            # What a proxy says of its clients is not believed: anyone on this machine could say it.
            proxy_headers=False,
        )
    )


@dataclass(frozen=True, slots=True)
class Performer:
    """Does one run with the configuration of this moment; a real one under the lock that writers share.

    `readings` are shared by all runs until the configuration is read again: a source that has not
    changed is not read again.
    """

    config: Callable[[], Config]
    readings: Callable[[], Readings]
    history: History
    pause: Callable[[float], object]
    now: Now = utc_now

    def __call__(
        self,
        options: RunOptions,
        *,
        should_stop: Callable[[], bool],
        on_plan: Callable[[Plan], None],
        report: Report,
    ) -> Result:
        """Do the run; raises SyncdError."""
        config, readings = self.config(), self.readings()

        def go() -> Result:
            return reconciler.run(
                config,
                options,
                readings=readings,
                should_stop=should_stop,
                on_plan=on_plan,
                report=report,
                sleep=self.pause,
                now=self.now,
            )

        if options.dry_run:
            return go()
        with write_lock(
            config.daemon.state_dir,
            "syncd run",
            patience=_LOCK_PATIENCE,
            should_stop=should_stop,
            sleep=self.pause,
        ):
            for run_id in self.history.close_interrupted():
                _log.warning("interrupted_run_closed", interrupted=run_id)
            return go()


def trigger_of(config: ScheduleConfig) -> CronTrigger | IntervalTrigger:
    """Return when runs are due."""
    jitter = int(config.jitter.total_seconds()) if config.jitter else None
    if config.cron is not None:
        trigger = CronTrigger.from_crontab(config.cron, timezone=UTC)
        trigger.jitter = jitter
        return trigger
    return IntervalTrigger(seconds=int(config.interval.total_seconds()), jitter=jitter, timezone=UTC)


def schedule(
    scheduler: BackgroundScheduler, request: Callable[[], object], config: ScheduleConfig, first: datetime
) -> None:
    """Have `request` called at `first` and whenever it is due; what is late is made up for, once.

    APScheduler's own defaults start after one interval, and skip what is a second late.
    """
    scheduler.add_job(
        request,
        trigger_of(config),
        id=_JOB,
        next_run_time=first,
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,
    )
