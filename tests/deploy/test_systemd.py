"""What the systemd units promise; systemd's own check runs where systemd-analyze is there."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openmeter_plugin.api.access import MIN_TOKEN_LENGTH
from openmeter_plugin.process import supervisor, systemd
from openmeter_plugin.process.sockets import BACKLOG
from syncd.config.settings import load
from tests.deploy.files import ROOT
from tests.deploy.units import BIN, SYSTEMD, Unit, one, unit, with_other_places
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import eventually
from tests.harness.recordings import serialized

pytestmark = pytest.mark.slow

SERVICES = ("openmeter-plugin.service", "syncd.service")
ENABLE_THE_PLUGIN = ROOT / "docs" / "howto" / "enable-the-plugin.md"
HERE = str(Path(sys.executable).parent)
EXPOSURE = 2.0
"""systemd's own mark for what a service could do to the machine: 10 is everything."""

each = pytest.mark.parametrize("name", SERVICES)
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def seconds(text: str) -> float:
    number, what = re.fullmatch(r"(\d+)(ms|s)?", text).groups()  # type: ignore[union-attr]
    return int(number) / (1000 if what == "ms" else 1)


def what_systemd_finds(folder: Path, places: dict[str, str]) -> str:
    """Have systemd check the units, with a stand-in for Kong's own."""
    units = with_other_places(folder, places)
    (folder / "kong.service").write_text("[Service]\nExecStart=/bin/true\n")
    command = ["systemd-analyze", "verify", "--man=no", *map(str, units), str(folder / "kong.service")]
    found = subprocess.run(command, capture_output=True, text=True).stderr
    return "".join(line for line in found.splitlines(keepends=True) if str(folder) in line)


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    assert what_systemd_finds(tmp_path, {BIN: HERE}) == ""


@needs_systemd
def test_systemd_would_have_found_a_misspelt_setting(tmp_path: Path) -> None:
    misspelt = {"KillMode=": "KillMod=", "LoadCredential=": "LoadCredentials=", "EnvironmentFile=": "Files="}
    found = what_systemd_finds(tmp_path, {BIN: HERE, **misspelt})
    for wrong in ("KillMod", "LoadCredentials", "Files"):  # in units and in drop-ins
        assert f"'{wrong}'" in found


@needs_systemd
@each
def test_a_service_could_do_little_to_the_machine(name: str, tmp_path: Path) -> None:
    with_other_places(tmp_path, {BIN: HERE})
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}"]
    checked = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-300:]


@each
def test_the_commands_are_those_of_the_project(name: str) -> None:
    programs = {shlex.split(command)[0] for command in unit(name)["Service"]["ExecStart"]}
    assert programs <= {f"{BIN}/openmeter-plugin", f"{BIN}/syncd"}
    assert f"{BIN}/" in ENABLE_THE_PLUGIN.read_text()


@each
def test_a_service_that_ends_is_started_again_for_ever(name: str) -> None:
    found = unit(name)
    assert one(found, "Restart") == "always"
    assert one(found, "StartLimitIntervalSec", "Unit") == "0"


@each
def test_its_user_is_made_by_sysusers(name: str) -> None:
    users = re.findall(r"^u (\S+) ", (SYSTEMD / "sysusers.conf").read_text(), re.MULTILINE)
    assert one(unit(name), "User") in users


def test_socket_and_plugin_server_are_there_before_kong_and_kong_serves_without_them() -> None:
    names = ["openmeter-plugin.socket", "openmeter-plugin.service"]
    assert [one(unit(name), "Before", "Unit") for name in names] == ["kong.service"] * 2
    drop_in = (SYSTEMD / "kong.service.d" / "openmeter.conf").read_text()
    assert f"Wants={' '.join(names)}\nAfter={' '.join(names)}\n" in drop_in
    assert not re.search(r"^(Requires|BindsTo|PartOf)=", drop_in, re.MULTILINE)


def test_the_socket_is_the_services_and_systemd_holds_it() -> None:
    service = unit("openmeter-plugin.service")
    for key in ("Requires", "After"):
        assert one(service, key, "Unit") == "openmeter-plugin.socket"
    # The service's own folder of this name would be removed with it, the socket in it.
    assert "RuntimeDirectory" not in service["Service"]
    held = unit("openmeter-plugin.socket")
    assert one(held, "ListenStream", "Socket") in ENABLE_THE_PLUGIN.read_text()
    assert one(held, "FileDescriptorName", "Socket") == systemd.PLUGIN
    assert int(one(held, "Backlog", "Socket")) == BACKLOG


def test_kong_is_in_the_group_of_the_socket_and_nobody_else_may_connect() -> None:
    held = unit("openmeter-plugin.socket")
    assert one(held, "SocketGroup", "Socket") == "kong"
    assert one(held, "SocketMode", "Socket") == "0660"
    assert one(held, "SocketUser", "Socket") == one(unit("openmeter-plugin.service"), "User")


def test_the_spool_is_in_the_folder_that_systemd_makes() -> None:
    found = unit("openmeter-plugin.service")
    spool = one(found, "Environment").removeprefix("OPENMETER_PLUGIN_SPOOL=")
    state = Path("/var/lib") / one(found, "StateDirectory")
    assert Path(spool).parent == state
    assert one(found, "RequiresMountsFor", "Unit") == str(state)


def test_the_plugin_server_starts_with_the_machine_and_not_with_the_first_request() -> None:
    assert one(unit("openmeter-plugin.service"), "WantedBy", "Install") == "multi-user.target"
    assert one(unit("openmeter-plugin.socket"), "WantedBy", "Install") == "sockets.target"


@each
def test_processes_are_asked_to_stop_and_have_the_time_for_it(name: str) -> None:
    found = unit(name)
    assert one(found, "KillMode") == ("mixed" if name.startswith("syncd") else "control-group")
    # After a crash of the supervisor systemd waits for the others, before it starts the service again.
    assert seconds(one(found, "TimeoutStopSec")) > supervisor._ORPHAN_SECONDS


def test_the_drop_in_adds_the_api_and_changes_nothing_else_of_the_command() -> None:
    without = shlex.split(one(unit("openmeter-plugin.service"), "ExecStart"))
    with_api = unit("openmeter-plugin.service", "api.conf")
    command = shlex.split(one(with_api, "ExecStart"))
    assert command[: len(without)] == without
    name, path = one(with_api, "LoadCredential").split(":")
    assert command[len(without) :] == [
        *("--api", "127.0.0.1:8096"),
        *("--api-token-file", f"${{CREDENTIALS_DIRECTORY}}/{name}"),
    ]
    assert Path(path).parent == Path("/etc/kong-openmeter")


# The commands, run here

# What systemd does between fork and exec.
_PASS_ON = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def started(found: Unit, folder: Path, listener: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """Start the plugin server as its units say, in other folders."""
    (folder / "plugin-api-token").write_text("x" * MIN_TOKEN_LENGTH)
    command = one(found, "ExecStart")
    places = {BIN: HERE, "${CREDENTIALS_DIRECTORY}": str(folder), "127.0.0.1:8096": "127.0.0.1:0"}
    for old, new in places.items():
        command = command.replace(old, new)
    name = one(unit("openmeter-plugin.socket"), "FileDescriptorName", "Socket")
    process = subprocess.Popen(
        [sys.executable, "-c", _PASS_ON, str(listener.fileno()), name, *shlex.split(command)],
        env=os.environ | {"OPENMETER_PLUGIN_SPOOL": str(folder / "spool")},
        pass_fds=[listener.fileno()],
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd holds."""
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "openmeter.socket"))
        held.listen(BACKLOG)
        yield held


@pytest.mark.parametrize("drop_ins", [(), ("api.conf",)])
def test_what_kong_hands_over_before_the_start_and_between_two_starts_is_taken(
    drop_ins: tuple[str, ...], tmp_path: Path, listener: socket.socket
) -> None:
    found = unit("openmeter-plugin.service", *drop_ins)
    plugin = PluginInstance({"ingest_endpoint": "http://127.0.0.1:9/events"})

    async def hand_over(worker: KongWorker) -> None:
        assert await worker.log(plugin, serialized("authenticated"))

    async def through_a_restart() -> KongWorker:
        worker = KongWorker(tmp_path / "openmeter.socket")
        for _ in range(2):
            early = asyncio.create_task(hand_over(worker))
            with started(found, tmp_path, listener) as process:
                await early
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, seconds(one(found, "TimeoutStopSec"))) == 0
        await worker.close()
        return worker

    tally = asyncio.run(through_a_restart()).tally
    assert (len(tally.acknowledged), tally.lost, tally.refused_connections) == (2, [], 0)


def test_sigterm_to_the_supervisor_alone_stops_all_of_its_processes_in_time(
    tmp_path: Path, listener: socket.socket
) -> None:
    found = unit("openmeter-plugin.service")
    with started(found, tmp_path, listener) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        eventually(lambda: len(children.read_text().split()) == 2, what="two children")
        pids = [int(pid) for pid in children.read_text().split()]
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(seconds(one(found, "TimeoutStopSec"))) == 0
        assert time.monotonic() - began < seconds(one(found, "TimeoutStopSec"))
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_syncd_takes_its_configuration_and_its_tokens_from_where_the_unit_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = unit("syncd.service")
    assert one(found, "Environment") == "SYNCD_CONFIG=/etc/syncd/syncd.yaml"
    assert one(found, "EnvironmentFile").startswith("-")  # without tokens it starts, and says what it lacks
    state = Path("/var/lib") / one(found, "StateDirectory")
    monkeypatch.setenv("STATE_DIRECTORY", str(state))
    monkeypatch.setenv("SYNCD_METERING__TOKEN", "token")
    config = load(ROOT / "docs" / "examples" / "syncd.yaml")
    assert config.daemon.state_dir == state
    assert config.metering.token is not None
    assert one(found, "ExecReload") == "/bin/kill -HUP $MAINPID"
