"""``syncd run``: a run at the start, one each interval, more on request; never two at once."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import structlog
import uvicorn
from apscheduler.schedulers.background import BackgroundScheduler

from syncd import runner
from syncd.api import create_app
from syncd.changes import Plan
from syncd.config import Config
from syncd.errors import DaemonError
from syncd.listen import Listen
from syncd.runner import Result
from syncd.runs import Runs

_log = structlog.get_logger("syncd.daemon")

_JOB = "sync"


def run_until_signalled(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT, which stop it between two changes; raises DaemonError."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda _number, _frame: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with running(config):
            stop.wait()
            _log.info("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(config: Config) -> Iterator[Listen]:
    """Run the daemon in threads of this process and yield the address that it really listens on."""
    stopping = threading.Event()
    runs = Runs(_performer(config, stopping.wait), stopping)
    scheduler = BackgroundScheduler(timezone=UTC)
    token = config.daemon.token.get_secret_value() if config.daemon.token else None
    app = create_app(runs, token=token, next_run=lambda: _next_run(scheduler))
    with _listening(config.daemon.listen) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, ws="none", lifespan="off", server_header=False
            )
        )
        threads = [
            threading.Thread(target=server.run, args=([listener],), name="syncd-api"),
            threading.Thread(target=runs.work, name="syncd-worker"),
        ]
        for thread in threads:
            thread.start()
        try:
            schedule(
                scheduler,
                lambda: runs.request("schedule", dry_run=False),
                config.schedule.interval,
                datetime.now(UTC),
            )
            scheduler.start()
            address = Listen(config.daemon.listen.host, listener.getsockname()[1])
            _log.info("listening", url=address.url, interval_seconds=config.schedule.interval.total_seconds())
            yield address
        finally:
            if scheduler.running:
                scheduler.shutdown()
            runs.stop()
            server.should_exit = True
            for thread in threads:
                thread.join()


def _performer(config: Config, pause: Callable[[float], object]) -> Callable[..., Result]:
    def perform(*, dry_run: bool, should_stop: Callable[[], bool], on_plan: Callable[[Plan], None]) -> Result:
        return runner.run(config, dry_run=dry_run, should_stop=should_stop, on_plan=on_plan, sleep=pause)

    return perform


def schedule(
    scheduler: BackgroundScheduler, request: Callable[[], object], interval: timedelta, first: datetime
) -> None:
    """Have `request` called at `first` and once each interval; what is late is made up for, once.

    APScheduler's own defaults start after one interval, and skip what is a second late.
    """
    scheduler.add_job(
        request,
        "interval",
        id=_JOB,
        seconds=interval.total_seconds(),
        next_run_time=first,
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,
    )


def _next_run(scheduler: BackgroundScheduler) -> str | None:
    job = scheduler.get_job(_JOB)
    return job.next_run_time.isoformat() if job and job.next_run_time else None


@contextmanager
def _listening(address: Listen) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        raise DaemonError(
            f"cannot listen on {address.host}:{address.port} (daemon.listen): {error.strerror or error}"
        ) from None
    with listener:
        yield listener
