"""The service manager: with its sockets no connection is refused in a restart, and it hears of our state."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import httpx
import pytest

from openmeter_plugin.process.sockets import Listeners, TcpListener, UnixListener
from openmeter_plugin.process.systemd import ActivationError, Notifier, use_passed_sockets
from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import eventually
from tests.harness.recordings import Recorded, serialized
from tests.harness.service_manager import managed, notified, unix_listener

pytestmark = pytest.mark.slow


def plugin(sandbox: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "activated",
        }
    )


def request(request_id: str) -> Recorded:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    return Recorded(request_id, template.log.replace(original, request_id.encode()))


def stored(sandbox: str) -> int:
    return int(httpx.get(f"{sandbox}/sandbox/v1/stats", trust_env=False).json()["events_stored"])


def test_a_request_between_two_servers_is_answered_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        running_sandbox() as sandbox,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):
        eventually(lambda: manager.events("serving"), what="serving")
        place = path.stat().st_ino
        assert manager.end() == 0
        assert path.stat().st_ino == place

        async def hand_over() -> KongWorker:
            worker = KongWorker(path)
            waiting = asyncio.create_task(worker.log(plugin(sandbox), request("waited"), "waited"))
            await worker_waits(waiting)
            manager.start()
            assert await waiting
            await worker.close()
            return worker

        assert asyncio.run(hand_over()).tally.lost == []
        eventually(lambda: stored(sandbox) == 1, what="the arrival")


async def worker_waits(waiting: asyncio.Task[bool]) -> None:
    """Let a request get as far as it can without a server."""
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not waiting.done()


CONFIGURATION = "ingest_endpoint: {}/api/v1/events\nqueue: {{max_coalescing_delay: 0.05}}\n"


def test_a_post_of_http_log_between_two_servers_is_answered_by_the_next_one(
    tmp_path: Path,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    statuses: list[int] = []

    def post() -> None:
        log = b"[" + request("posted").log + b"]"
        headers = {"content-type": "application/json"}
        answer = httpx.post(url, content=log, headers=headers, timeout=30, trust_env=False)
        statuses.append(answer.status_code)

    with running_sandbox() as sandbox:
        (tmp_path / "openmeter-plugin.yaml").write_text(CONFIGURATION.format(sandbox))
        with managed(tmp_path, http_log=listener) as manager:
            eventually(lambda: manager.events("serving"), what="serving")
            assert manager.end() == 0
            posting = threading.Thread(target=post)
            posting.start()
            manager.start()
            posting.join(30)
            assert statuses == [200]
            eventually(lambda: stored(sandbox) == 1, what="the arrival")


def test_both_inputs_are_served_without_options_and_logged_as_passed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    (tmp_path / "openmeter-plugin.yaml").write_text(CONFIGURATION.format("http://127.0.0.1:9"))
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with managed(tmp_path, http_log=listener, plugin=unix_listener(path)) as manager:
        (entry,) = eventually(lambda: manager.events("listening"), what="listening")
        assert (entry["on"], entry["passed"]) == ([str(path), address], [str(path), address])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--socket", "other"), "--socket: is other, but the passed socket is at "),
        (("--bogus",), "No such option"),
        (("--http-log", "127.0.0.1:0", "--http-log-config", "none"), "--http-log-config: none: "),
    ],
)
def test_a_start_that_fails_names_its_reason_and_leaves_the_passed_socket_alone(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "s"
    with managed(tmp_path, *arguments, plugin=unix_listener(path)) as manager:
        assert manager.process
        assert manager.process.wait(20) != 0
        assert message in manager.log_file.read_text()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
        assert not (tmp_path / "other").exists()


def test_a_passed_socket_whose_file_is_gone_is_logged_and_replaced_by_a_new_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    listener = unix_listener(path)
    path.unlink()
    with managed(tmp_path, "--socket", str(path), plugin=listener) as manager:
        eventually(lambda: manager.events("serving"), what="serving")
        (entry,) = manager.events("passed_socket_unreachable")
        assert entry["socket"] == str(path)
        assert manager.events("listening")[0]["passed"] == []
        assert path.is_socket()
        manager.end()
        assert not path.exists()


def test_sockets_that_were_passed_to_another_process_are_logged_and_not_touched(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "s"
    command = [sys.executable, "-m", "openmeter_plugin", "serve", "--socket", str(path), "--spool", "spool"]
    variables = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "plugin"}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=os.environ | variables, stderr=stderr, cwd=tmp_path)
    try:
        eventually(lambda: '"serving"' in log.read_text(), what="serving")
        assert "sockets_passed_to_another_process" in log.read_text()
    finally:
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
def test_systemds_own_tool_passes_the_socket(tmp_path: Path) -> None:
    path, log = tmp_path / "s", tmp_path / "log"
    program = ["systemd-socket-activate", "--fdname=plugin", f"--listen={path}", sys.executable]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*program, "-m", "openmeter_plugin", "serve", "--spool", "spool"], stderr=stderr, cwd=tmp_path
        )
    try:
        eventually(path.exists, what="listening")

        async def hand_over() -> bool:
            worker = KongWorker(path)
            acknowledged = await worker.log(plugin("http://127.0.0.1:9"), request("first"))
            await worker.close()
            return acknowledged

        assert asyncio.run(hand_over())
        assert f'"passed": ["{path}"]' in log.read_text()
    finally:
        process.terminate()
        process.wait(20)


# Passing sockets to this process


@pytest.fixture
def passing() -> Iterator[Passing]:
    passed = Passing()
    yield passed
    for held in passed.held:
        held.close()
    for descriptor in passed.descriptors:  # those in use are closed already
        with suppress(OSError):
            os.close(descriptor)


class Passing:
    """Passes sockets to this process, as systemd would."""

    def __init__(self) -> None:
        self.held: list[socket.socket | IO[str]] = []
        self.descriptors: list[int] = []
        self.environment: dict[str, str] = {}

    def __call__(self, *sockets: socket.socket | IO[str], **changes: str) -> Listeners:
        """Pass sockets and return the resulting listeners; `changes` override the variables."""
        self.held += sockets
        first = max(held.fileno() for held in sockets) + 20
        for number, held in enumerate(sockets):
            self.descriptors.append(os.dup2(held.fileno(), first + number))
        variables = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets))}
        self.environment = {"HOME": "/", **variables, **changes}
        listeners = Listeners()
        try:
            use_passed_sockets(listeners, self.environment, first_descriptor=first)
        finally:
            self.held += [listener.socket for listener in listeners.opened]
        return listeners


def test_sockets_are_identified_by_name_in_any_order_and_the_variables_are_removed(
    passing: Passing, tmp_path: Path
) -> None:
    names = {"LISTEN_FDNAMES": "http-log:plugin"}
    listeners = passing(socket.create_server(("127.0.0.1", 0)), unix_listener(tmp_path / "s"), **names)
    assert isinstance(listeners.http_log, TcpListener)
    assert isinstance(listeners.plugin, UnixListener)
    assert listeners.plugin.path == tmp_path / "s"
    assert passing.environment == {"HOME": "/"}
    assert not any(os.get_inheritable(listener.socket.fileno()) for listener in listeners.opened)
    listeners.remove()
    assert (tmp_path / "s").exists()
    for listener in listeners.opened:
        assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_sockets_for_another_process_are_left_alone(passing: Passing, tmp_path: Path) -> None:
    listeners = passing(unix_listener(tmp_path / "s"), LISTEN_FDNAMES="plugin", LISTEN_PID="1")
    assert listeners.opened == []
    assert "LISTEN_FDS" in passing.environment


def test_the_address_of_a_passed_socket_is_known(passing: Passing) -> None:
    listeners = passing(socket.create_server(("127.0.0.1", 0)), LISTEN_FDNAMES="http-log")
    assert isinstance(listeners.http_log, TcpListener)
    assert listeners.http_log.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "FileDescriptorName="),
        ({"LISTEN_FDNAMES": "unknown"}, "a socket named 'unknown' was passed; set FileDescriptorName="),
        ({"LISTEN_FDNAMES": "openmeter-plugin.socket"}, "FileDescriptorName="),
        ({"LISTEN_FDNAMES": "plugin", "LISTEN_FDS": "many"}, "LISTEN_FDS is not a number"),
        ({"LISTEN_FDNAMES": "plugin:plugin", "LISTEN_FDS": "2"}, "two sockets named 'plugin'"),
    ],
)
def test_invalid_variables_are_an_error_with_the_remedy_and_stay(
    passing: Passing, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ActivationError, match=message):
        passing(unix_listener(tmp_path / "s"), **changes)
    assert "LISTEN_FDS" in passing.environment


def test_sockets_that_do_not_listen_or_are_of_another_kind_are_an_error(
    passing: Passing, tmp_path: Path
) -> None:
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for useless in (*socket.socketpair(), datagrams):
        with pytest.raises(ActivationError, match="does not listen for connections"):
            passing(useless, LISTEN_FDNAMES="plugin")
    with pytest.raises(ActivationError, match="of a kind that cannot be served"):
        passing(socket.create_server(("127.0.0.1", 0)), LISTEN_FDNAMES="plugin")
    with (tmp_path / "file").open("w") as file, pytest.raises(ActivationError, match="is not a socket"):
        passing(file, LISTEN_FDNAMES="plugin")


# Notifications

OWN_PID = str(os.getpid())


@pytest.mark.parametrize("abstract", [False, True], ids=["a path", "an abstract address"])
def test_the_service_manager_hears_of_the_start_the_watchdog_and_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    address = f"@openmeter-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    path = tmp_path / "s"
    with (
        notified(address) as listener,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):
        messages = [listener.recv(1000)]
        while messages[-1] != b"READY=1":
            messages.append(listener.recv(1000))
        assert set(messages[:-1]) == {b"WATCHDOG=1"}
        assert manager.events("serving"), "it is ready once all its processes work"
        assert listener.recv(1000) == b"WATCHDOG=1"
        assert manager.end() == 0
        while (last := listener.recv(1000)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


@pytest.mark.parametrize(
    ("variables", "heard"),
    [
        ({}, [b"READY=1", b"WATCHDOG=1"]),
        (
            {"SYSTEMD_EXEC_PID": OWN_PID, "WATCHDOG_PID": OWN_PID},
            [b"READY=1", b"WATCHDOG=1"],
        ),
        ({"SYSTEMD_EXEC_PID": "1"}, []),  # it started Kong, and Kong us
        ({"WATCHDOG_PID": "1"}, [b"READY=1"]),
    ],
)
def test_only_the_process_that_the_service_manager_started_reports_to_it(
    tmp_path: Path, variables: dict[str, str], heard: list[bytes]
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "30000000", "PATH": "x"} | variables
    with notified(environment["NOTIFY_SOCKET"]) as listener:
        listener.settimeout(0)
        notifier = Notifier(environment)
        assert environment.keys() <= {"PATH", "SYSTEMD_EXEC_PID"}, "child processes do not report"
        notifier.ready()
        notifier.alive()
        notifier.alive()  # too soon for another
        received = []
        with suppress(BlockingIOError):
            while True:
                received.append(listener.recv(1000))
        assert received == heard


def test_without_a_service_manager_nothing_is_sent_and_one_that_is_gone_is_no_error(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.stopping()
        assert notifier.is_ready
