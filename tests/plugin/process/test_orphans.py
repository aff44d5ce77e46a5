"""The other processes after kill -9 of their supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.process import eventually
from tests.harness.service_manager import managed, unix_listener
from tests.plugin.traffic import TOKEN, assert_nothing_lost, drive_through

pytestmark = pytest.mark.slow

# A child process that ignores SIGTERM after it has noted it.
_STUBBORN = """
import os, signal, sys, time
from openmeter_plugin.process import supervisor

def run():
    signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], "w").write("SIGTERM"))
    while True:
        print(os.getpid(), flush=True)
        time.sleep(0.1)

supervisor.Child("stubborn", run, 0, orphan_seconds=0.2).start(supervisor.Heartbeats(1))
time.sleep(20)
"""


def test_with_socket_activation_nothing_is_lost_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        running_sandbox(token=TOKEN) as sandbox,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):

        def kill() -> None:
            assert manager.end(signal.SIGKILL) == -signal.SIGKILL
            manager.start()

        worker = drive_through(path, sandbox, kill)
        assert_nothing_lost(worker, sandbox)
        assert len(manager.events("serving")) == 4
        eventually(lambda: len(manager.events("stopped")) == 3, what="the end of the workers left behind")


def test_a_stopped_worker_answers_kong_once_its_supervisor_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        running_sandbox(token=TOKEN) as sandbox,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):
        eventually(lambda: manager.events("delivery_started"), what="the delivery")

        def stop_and_kill() -> None:
            (worker,) = [event["pid"] for event in manager.events("serving")][-1:]
            os.kill(int(str(worker)), signal.SIGSTOP)
            assert manager.end(signal.SIGKILL) == -signal.SIGKILL
            manager.start()

        worker = drive_through(path, sandbox, stop_and_kill, times=1)
        assert_nothing_lost(worker, sandbox)
        eventually(lambda: len(manager.events("stopped")) == 1, what="the end of the worker left behind")


def test_without_pidfd_a_child_process_ends_at_once_with_its_supervisor(
    tmp_path: Path,
) -> None:
    signalled = tmp_path / "signalled"
    unable = "def pidfd_open(pid): raise OSError\nos.pidfd_open = pidfd_open\n"
    with subprocess.Popen(
        [sys.executable, "-c", _STUBBORN.replace("def run", f"{unable}def run"), str(signalled)],
        stdout=subprocess.PIPE,
        text=True,
    ) as supervisor:
        assert supervisor.stdout
        child = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()
        eventually(lambda: _has_ended(child), what="the end of the child")
        os.close(child)
    assert not signalled.exists()


def test_a_child_process_gets_sigterm_when_its_supervisor_is_gone_and_is_ended_if_it_does_not_stop(
    tmp_path: Path,
) -> None:
    signalled = tmp_path / "signalled"
    with subprocess.Popen(
        [sys.executable, "-c", _STUBBORN, str(signalled)], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout
        child = os.pidfd_open(int(supervisor.stdout.readline()))
        for _ in range(5):
            assert supervisor.stdout.readline(), "it is left alone while its supervisor lives"
        supervisor.kill()
        eventually(signalled.exists, what="SIGTERM")
        eventually(lambda: _has_ended(child), what="the end of the child")
        os.close(child)


def _has_ended(process: int) -> bool:
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        return True
    return False
