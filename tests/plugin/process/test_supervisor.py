"""The supervisor's child processes: restarted with bounded delays, and stopped within a bound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openmeter_plugin.process.supervisor import Child
from tests.harness.process import eventually, plugin_server

pytestmark = pytest.mark.slow

STUBBORN = """
import os, signal, subprocess, sys
from openmeter_plugin.process import supervisor

deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
process.stdout.readline()
child = supervisor.Child("stubborn", lambda: None, 0)
child.pid = process.pid
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
supervisor._stop([child], 0.2)
print("left" if os.path.exists(f"/proc/{process.pid}") else "gone")
"""


def test_a_child_process_that_ignores_sigterm_is_killed_within_the_bound() -> None:
    result = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1:] == ["gone"], result.stderr


def test_a_child_process_that_keeps_ending_is_restarted_with_growing_delays_up_to_a_second() -> None:
    child = Child("worker", lambda: None, 0)
    pauses = []
    for _ in range(8):
        child._started = now = time.monotonic()
        child.exited(1)
        assert child.start_at >= now + child._delay
        pauses.append(child._delay)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_a_child_process_that_lived_for_a_while_is_restarted_at_once() -> None:
    child = Child("worker", lambda: None, 0)
    for lived in (0.0, 5.0):
        child._started = time.monotonic() - lived
        child.exited(1)
    assert child.start_at <= time.monotonic()


def test_a_server_that_was_suspended_as_a_whole_keeps_its_processes(tmp_path: Path) -> None:
    with plugin_server(tmp_path, "--hang-timeout", "2") as server:
        eventually(lambda: '"delivery_started"' in server.log_text(), what="the delivery")
        eventually(lambda: '"serving"' in server.log_text(), what="serving")
        children = server.children()
        processes = [server.process.pid, *children]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # like `docker pause`, for longer than the hang timeout
        for pid in reversed(processes):
            os.kill(pid, signal.SIGCONT)
        os.kill(children[0], signal.SIGKILL)
        eventually(lambda: server.log_text().count('"serving"') == 2, what="a restart by the supervisor")
        assert children[1] in server.children()
        assert "process_hung" not in server.log_text()
