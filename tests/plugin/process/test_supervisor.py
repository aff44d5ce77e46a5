"""The supervisor's children: started again at a bounded pace, and stopped within a bound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from openmeter_plugin.process.supervisor import Child
from tests.harness.process import eventually, plugin_server

STUBBORN = """
import os, signal, subprocess, sys
from openmeter_plugin.process import supervisor

supervisor._STOP_SECONDS = 0.2
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
process.stdout.readline()
child = supervisor.Child("stubborn", lambda: None, 0)
child.pid = process.pid
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
supervisor._stop([child])
print("left" if os.path.exists(f"/proc/{process.pid}") else "gone")
"""


def test_a_child_that_takes_no_notice_of_a_stop_is_killed_within_the_bound() -> None:
    result = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1:] == ["gone"], result.stderr


def test_a_child_that_keeps_dying_is_started_again_more_and_more_slowly_and_once_a_second_at_least() -> None:
    child = Child("worker", lambda: None, 0)
    pauses = []
    for _ in range(8):
        child._started = now = time.monotonic()
        child.died(1)
        assert child.start_at >= now + child._delay
        pauses.append(child._delay)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_a_child_that_lived_for_a_while_is_started_again_at_once() -> None:
    child = Child("worker", lambda: None, 0)
    for lived in (0.0, 5.0):
        child._started = time.monotonic() - lived
        child.died(1)
    assert child.start_at <= time.monotonic()


def test_a_server_that_was_stopped_as_a_whole_goes_on_with_the_same_processes(tmp_path: Path) -> None:
    with plugin_server(tmp_path, "--hang-timeout", "2") as server:
        eventually(lambda: '"delivery_started"' in server.log_text(), what="the delivery")
        eventually(lambda: '"serving"' in server.log_text(), what="serving")
        children = server.children()
        everybody = [server.process.pid, *children]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # as `docker pause` does, for longer than a child may be silent
        for pid in reversed(everybody):
            os.kill(pid, signal.SIGCONT)
        os.kill(children[0], signal.SIGKILL)
        eventually(lambda: server.log_text().count('"serving"') == 2, what="that it goes on supervising")
        assert children[1] in server.children()
        assert "process_hangs" not in server.log_text()
