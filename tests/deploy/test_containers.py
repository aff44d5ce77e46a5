"""What the containers run, run here: the same commands and environments, other folders and free ports."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import httpx
import pytest

from tests.deploy.files import ROOT, mounts, service
from tests.harness.ports import free_port
from tests.harness.process import eventually

pytestmark = pytest.mark.slow

TOKEN = "sandbox-token"
COMMANDS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as a container would; stopped by SIGTERM."""
    process = subprocess.Popen(
        command, env=os.environ | {"PATH": COMMANDS} | environment, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            # A container's end is the end of all its processes, whether or not they got the signal.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_healthy(name: str, replacements: dict[str, str]) -> bool:
    """Run a service's healthcheck with other places in the place of the container's."""
    words: list[str] = service(name)["healthcheck"]["test"]
    assert words[:3] == ["CMD", "python", "-c"]
    program = words[3]
    for old, new in replacements.items():
        assert old in program
        program = program.replace(old, new)
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@contextmanager
def plugin_container(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the plugin image's entrypoint with the compose file's command."""
    spool = str(folder / "spool")
    script = str(ROOT / "plugin" / "docker-entrypoint.sh")
    command = [word.replace("/run/openmeter", str(folder)) for word in service("plugin")["command"]]
    with running(script, *command, OPENMETER_PLUGIN_RUN=str(folder), OPENMETER_PLUGIN_SPOOL=spool) as process:
        yield process


@contextmanager
def sandbox_container(folder: Path) -> Iterator[str]:
    """Run the sandbox with the compose file's command; yields its URL."""
    port = free_port()
    replaced = {"0.0.0.0": "127.0.0.1", "8888": str(port), "/data/sandbox.sqlite3": str(folder / "db")}
    command = [replaced.get(word, word) for word in service("sandbox")["command"]]
    assert list(replaced.values()) == [word for word in command if word in replaced.values()]
    with running("syncd", *command, SYNCD_SANDBOX_TOKEN=TOKEN):
        eventually(
            lambda: is_healthy("sandbox", {"127.0.0.1:8888": f"127.0.0.1:{port}"}), what="sandbox health"
        )
        yield f"http://127.0.0.1:{port}"


def test_the_plugin_container_gets_healthy_only_when_it_listens_and_the_info_is_there(tmp_path: Path) -> None:
    places = {"/run/openmeter": str(tmp_path)}
    assert not is_healthy("plugin", places)
    with plugin_container(tmp_path):
        eventually(lambda: is_healthy("plugin", places), what="plugin health")
        (tmp_path / "info.json").unlink()
        assert not is_healthy("plugin", places)


def test_a_socket_that_a_killed_plugin_server_left_behind_is_not_healthy(tmp_path: Path) -> None:
    places = {"/run/openmeter": str(tmp_path)}
    (tmp_path / "info.json").touch()
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(tmp_path / "openmeter.socket"))
    assert not is_healthy("plugin", places)


def test_the_info_that_kong_reads_is_what_the_info_command_prints(tmp_path: Path) -> None:
    with plugin_container(tmp_path):
        eventually((tmp_path / "openmeter.socket").exists, what="listening")
        printed = subprocess.run(
            ["openmeter-plugin", "info"], env=os.environ | {"PATH": COMMANDS}, capture_output=True
        )
        assert (tmp_path / "info.json").read_bytes() == printed.stdout
        assert json.loads(printed.stdout)["Plugins"][0]["Name"] == "openmeter"


def test_the_plugin_container_warns_of_no_variable_of_its_own_image(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with plugin_container(tmp_path):
        eventually((tmp_path / "openmeter.socket").exists, what="listening")
    assert "unknown_variable" not in capfd.readouterr().err


def test_only_the_group_may_use_the_socket_and_read_the_info(tmp_path: Path) -> None:
    with plugin_container(tmp_path):
        path, spool = tmp_path / "openmeter.socket", tmp_path / "spool"
        eventually(lambda: path.exists() and spool.exists(), what="listening")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE((tmp_path / "info.json").stat().st_mode) == 0o640
        assert stat.S_IMODE(spool.stat().st_mode) == 0o700


def test_the_plugin_container_stops_in_time_when_docker_asks_it_to(tmp_path: Path) -> None:
    grace = service("plugin")["stop_grace_period"]
    with plugin_container(tmp_path) as process:
        eventually((tmp_path / "openmeter.socket").exists, what="listening")
        process.send_signal(signal.SIGTERM)
        assert process.wait(float(grace.removesuffix("s"))) == 0
        assert not (tmp_path / "openmeter.socket").exists()


@pytest.fixture
def etc_syncd(tmp_path: Path) -> Path:
    """What /etc/syncd is in the container."""
    for target, source in mounts("syncd").items():
        if not target.startswith("/etc/syncd"):
            continue
        here = tmp_path / Path(target).relative_to("/etc/syncd")
        here.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, here)
        else:
            shutil.copy(ROOT / source, here)
    return tmp_path


def syncd_environment(etc_syncd: Path, sandbox: str, port: int) -> dict[str, str]:
    """The compose file's variables, with the places that they have here."""
    given: dict[str, str] = service("syncd")["environment"]
    places = {
        "/etc/syncd": str(etc_syncd),
        "/run/openmeter": str(etc_syncd),
        "http://sandbox:8888": sandbox,
        "0.0.0.0:8890": f"127.0.0.1:{port}",
    }
    found = {"STATE_DIRECTORY": str(etc_syncd / "state")}
    for name, value in given.items():
        found[name] = reduce(lambda text, place: text.replace(*place), places.items(), value)
    assert found["SYNCD_DAEMON__LISTEN"] != given["SYNCD_DAEMON__LISTEN"]
    return found


def test_syncd_reads_the_books_of_the_plugin_over_the_socket_that_nobody_else_may_use(
    etc_syncd: Path,
) -> None:
    with sandbox_container(etc_syncd) as sandbox, plugin_container(etc_syncd):
        eventually((etc_syncd / "api").exists, what="the API")
        assert stat.S_IMODE((etc_syncd / "api").stat().st_mode) == 0o600
        doctor = subprocess.run(
            ["syncd", "doctor", "--output=json"],
            env=os.environ | {"PATH": COMMANDS} | syncd_environment(etc_syncd, sandbox, free_port()),
            capture_output=True,
            text=True,
        )
        (found,) = (finding for finding in json.loads(doctor.stdout) if finding["check"] == "gateway")
        # A warning: it was read, and has sent nothing to this metering API yet.
        assert found["level"] == "warning", found
        assert found["text"].startswith("kong: "), found


def test_the_syncd_container_syncs_what_is_mounted_into_the_sandbox_and_takes_a_resync(
    etc_syncd: Path,
) -> None:
    port = free_port()
    with sandbox_container(etc_syncd) as sandbox:
        environment = syncd_environment(etc_syncd, sandbox, port)
        with running("syncd", *service("syncd")["command"], **environment):
            health = {"127.0.0.1:8890": f"127.0.0.1:{port}"}
            eventually(lambda: is_healthy("syncd", health), what="syncd health")
            resync = subprocess.run(
                ["syncd", "resync", "--wait"],
                env=os.environ | {"PATH": COMMANDS} | environment,
                capture_output=True,
                text=True,
            )
            assert resync.returncode == 0, resync.stderr
        answer = httpx.get(
            f"{sandbox}/api/v1/customers", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False
        )
        assert "acme" in {customer["key"] for customer in answer.raise_for_status().json()["items"]}


def test_the_sandbox_container_asks_for_the_token(tmp_path: Path) -> None:
    with sandbox_container(tmp_path) as sandbox:
        assert httpx.get(f"{sandbox}/api/v1/customers", trust_env=False).status_code == 401


def test_the_healthcheck_of_syncd_fails_where_nothing_listens() -> None:
    started = time.monotonic()
    assert not is_healthy("syncd", {"127.0.0.1:8890": f"127.0.0.1:{free_port()}"})
    assert time.monotonic() - started < 5
