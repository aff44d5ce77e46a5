"""What becomes of the processes behind a supervisor that was killed with kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from syncd.sandbox.testing import running_sandbox
from tests.harness.process import eventually
from tests.harness.service_manager import managed, unix_listener
from tests.plugin.traffic import TOKEN, assert_nothing_lost, drive_through

# A supervisor's child that does not care for what it is told.
_STUBBORN = """
import os, signal, sys, time
from openmeter_plugin.process import supervisor
supervisor._STOP_SECONDS = 0.2

def run():
    signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], "w").write("told"))
    while True:
        print(os.getpid(), flush=True)
        time.sleep(0.1)

supervisor.Child("stubborn", run, 0).start()
time.sleep(20)
"""


def test_behind_a_held_socket_nothing_is_lost_when_the_supervisor_is_killed(tmp_path: Path) -> None:
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


def test_where_the_kernel_cannot_watch_a_process_a_child_ends_at_once_with_its_supervisor(
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    unable = "def pidfd_open(pid): raise OSError\nos.pidfd_open = pidfd_open\n"
    with subprocess.Popen(
        [sys.executable, "-c", _STUBBORN.replace("def run", f"{unable}def run"), str(told)],
        stdout=subprocess.PIPE,
        text=True,
    ) as supervisor:
        assert supervisor.stdout
        child = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()
        eventually(lambda: _has_ended(child), what="the end of the child")
        os.close(child)
    assert not told.exists()


def test_a_child_is_told_that_its_supervisor_is_gone_and_ended_if_it_does_not_stop(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with subprocess.Popen(
        [sys.executable, "-c", _STUBBORN, str(told)], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout
        child = os.pidfd_open(int(supervisor.stdout.readline()))
        for _ in range(5):
            assert supervisor.stdout.readline(), "it is left alone while its supervisor lives"
        supervisor.kill()
        eventually(told.exists, what="SIGTERM")
        eventually(lambda: _has_ended(child), what="the end of the child")
        os.close(child)


def _has_ended(process: int) -> bool:
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        return True
    return False
