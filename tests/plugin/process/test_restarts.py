"""Restarts under traffic, with Kong's own rules for resending (tests/harness/kong.py)."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker
from tests.harness.process import children_of, eventually, plugin_server
from tests.harness.service_manager import managed, unix_listener
from tests.plugin.traffic import TOKEN, assert_nothing_lost, drive_through, plugin, request

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("signalled", ["the supervisor", "all processes"])
def test_a_restart_with_socket_activation_loses_nothing(tmp_path: Path, signalled: str) -> None:
    path = tmp_path / "s"
    with (
        running_sandbox(token=TOKEN) as sandbox,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):

        def restart() -> None:
            assert manager.process
            children = children_of(manager.process.pid) if signalled == "all processes" else []
            manager.process.terminate()
            for pid in children:  # as systemd does with a control group, the main process first
                os.kill(pid, signal.SIGTERM)
            assert manager.end() == 0
            manager.start()

        worker = drive_through(path, sandbox, restart)
        assert_nothing_lost(worker, sandbox)
        assert len(manager.events("serving")) == 4


def test_replacing_a_server_by_another_loses_nothing(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox, ExitStack() as stack:
        running = [stack.enter_context(plugin_server(tmp_path))]

        def replace() -> None:
            serving = running[-1].log_text().count('"serving"')
            running.append(stack.enter_context(plugin_server(tmp_path)))
            eventually(lambda: running[-1].log_text().count('"serving"') > serving, what="serving")
            assert running[-2].stop() == 0

        eventually(lambda: '"serving"' in running[0].log_text(), what="serving")
        assert_nothing_lost(drive_through(running[0].socket, sandbox, replace), sandbox)


def connections_below(directory: Path) -> int:
    """Return the number of connections of the sockets in a directory, accepted or pending."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    connected = {"02", "03"}  # pending, and accepted
    return sum(line.split()[5] in connected and f" {directory}/" in line for line in lines[1:])


def test_pending_connections_of_a_replaced_server_are_served_before_it_ends(
    tmp_path: Path,
) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path) as first:
        worker_process = eventually(lambda: first.child("worker") or 0, what="a worker")

        async def hand_over() -> KongWorker:
            worker, instance = KongWorker(first.socket), plugin(sandbox)
            assert await worker.log(instance, *request(0))
            os.kill(worker_process, signal.SIGSTOP)
            lanes = [asyncio.create_task(worker.log(instance, *request(n))) for n in range(1, 200)]
            async with asyncio.timeout(20):  # until all of them have connected, to the socket of the first
                while connections_below(tmp_path) < len(lanes):
                    await asyncio.sleep(0.01)
            with plugin_server(tmp_path) as second:
                eventually(lambda: second.log_text().count('"serving"') == 2, what="serving")
                first.process.terminate()
                os.kill(worker_process, signal.SIGCONT)
                assert all(await asyncio.gather(*lanes))
                assert await asyncio.to_thread(first.process.wait, 20) == 0
                await worker.close()
            return worker

        worker = asyncio.run(hand_over())
        assert dict(worker.tally.reasons) == {}
        assert len(worker.tally.acknowledged) == 200
