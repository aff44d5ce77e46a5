"""The supervisor's child processes: restarted with bounded delays, and stopped within a bound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openmeter_plugin.http_log import process as http_log_process
from openmeter_plugin.http_log import receiver
from openmeter_plugin.kong import worker
from openmeter_plugin.process import supervisor
from openmeter_plugin.process.supervisor import SUCCESSOR_SECONDS, Child, Heartbeats, restart_delay
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
supervisor.stop_all([child], 0.2)
print("left" if os.path.exists(f"/proc/{process.pid}") else "gone")
"""


def test_a_child_process_that_ignores_sigterm_is_killed_within_the_bound() -> None:
    result = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1:] == ["gone"], result.stderr


def test_the_longest_stop_of_a_child_process_ends_before_it_is_killed() -> None:
    of_worker = 2 * worker._STOP_SECONDS + worker._INSTANCE_FILES_SECONDS
    of_http_log = receiver._STOP_SECONDS + http_log_process._STOP_SECONDS
    assert max(of_worker, of_http_log) < supervisor._STOP_SECONDS
    assert of_worker + SUCCESSOR_SECONDS < supervisor._ORPHAN_SECONDS


def test_a_child_process_that_keeps_ending_is_restarted_with_growing_delays_up_to_a_second() -> None:
    delays = [0.0]
    for _ in range(8):
        delays.append(restart_delay(delays[-1], lived=0.1))
    assert delays[1:] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_a_child_process_that_lived_for_a_while_is_restarted_at_once() -> None:
    assert restart_delay(0.8, lived=5.0) == 0.0


def test_a_child_process_that_ended_is_restarted_and_the_restart_counted() -> None:
    heartbeats, child = Heartbeats(1), Child("worker", lambda: None, 0)
    for restarts in range(3):
        child.start(heartbeats)
        assert child.pid is not None
        assert heartbeats.pids() == [child.pid]
        _, status = os.waitpid(child.pid, 0)
        child.exited(os.waitstatus_to_exitcode(status), heartbeats)
        assert (heartbeats.restarts(0), heartbeats.pids()) == (restarts, [])


# A child process whose main thread holds the interpreter's lock for ever, beside one that waits.
HUNG = """
import ctypes, os, pathlib, threading, time
from openmeter_plugin.log import configure_logging
from openmeter_plugin.process.supervisor import Child, Heartbeats

def stuck():
    threading.Thread(target=threading.Event().wait).start()
    while threading.active_count() < 3:  # with the one that watches the supervisor
        time.sleep(0.01)
    os.write(1, b"hangs")
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)  # PyDLL keeps the lock

configure_logging("supervisor")
child = Child("worker", stuck, 0)
child.start(Heartbeats(1))
while "S" not in pathlib.Path(f"/proc/{child.pid}/stat").read_text() or not os.path.exists("go"):
    time.sleep(0.05)
child.replace_hung(10.0)
print(os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]))
"""


def test_of_a_hung_process_the_log_has_the_stacks_of_all_threads(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HUNG]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as supervisor:
        assert supervisor.stdout
        assert supervisor.stderr
        assert supervisor.stdout.read(5) == "hangs"
        (tmp_path / "go").touch()
        assert supervisor.stdout.read().strip() == str(-signal.SIGKILL)
        entries = [json.loads(line) for line in supervisor.stderr]
    (hung,) = [entry for entry in entries if entry["event"] == "process_hung"]
    assert (hung["child"], hung["threads"], hung["state"]) == ("worker", 3, "S")
    stacks = [entry["stack"] for entry in entries if entry["event"] == "hung_thread"]
    assert sum("in stuck" in stack for stack in stacks) == 1
    assert sum("in wait_and_exit" in stack for stack in stacks) == 1
    assert sum("threading.py" in stack and "in wait\n" in stack for stack in stacks) == 1


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
