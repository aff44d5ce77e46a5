"""What the images promise, and how they run: as docker-compose.yml's services, and as an init container."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from lupa import luajit21

from openmeter_plugin import __version__
from openmeter_plugin.config.schema import info_json
from tests.demo.__main__ import TOKEN, check, drive, stats, wait_for_delivery
from tests.demo.gateway import Gateway
from tests.demo.traffic import Expected
from tests.harness.ports import free_port
from tests.images.containers import CLOSED, USER, Container, of_compose, running, volume
from tests.images.engine import BASE, NAMES, Engine, image, missing_programs

ENGINE = Engine()
MEGABYTES_OVER_BASE = 60
AT_ONCE = 5.0
"""Seconds in which a container has to end. podman needs up to two of them itself."""


REQUESTS = 500


@dataclass(frozen=True)
class Services:
    """The running services of docker-compose.yml, and the sandbox's address."""

    folder: Path
    url: str
    sandbox: Container
    plugin: Container
    syncd: Container


def _images_are_missing() -> bool:
    return bool(missing_programs()) or not all(ENGINE.has(image(name)) for name in NAMES)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_images_are_missing(), reason="needs the images: run make images"),
]
both = pytest.mark.parametrize("name", NAMES)


def shell(name: str, script: str) -> str:
    return ENGINE.run("podman", "run", "--rm", *CLOSED, "--entrypoint", "sh", image(name), "-c", script)


@both
def test_an_image_is_at_most_60_mb_larger_than_its_base(name: str) -> None:
    assert (ENGINE.size(image(name)) - ENGINE.size(BASE)) / 1e6 <= MEGABYTES_OVER_BASE


@both
def test_an_image_has_neither_compiler_nor_installer_nor_cache(name: str) -> None:
    unwanted = "/opt/kong-openmeter/bin/pip* /root/.cache /var/lib/apt/lists/* /src"
    assert shell(name, f"command -v cc gcc strip; ls -d {unwanted} 2>/dev/null || true").split() == []


@both
def test_an_image_runs_as_its_own_user_and_names_its_version(name: str) -> None:
    assert shell(name, "id -u; id -g").split() == [str(USER), str(USER)]
    (found,) = json.loads(ENGINE.run("podman", "image", "inspect", image(name)))
    assert found["Labels"]["org.opencontainers.image.version"] == __version__


# An init container, for a Kong whose image has no Python and no shell


def test_an_init_container_lays_out_what_kong_needs_in_a_shared_folder(tmp_path: Path) -> None:
    share = volume(tmp_path / "share")
    where = ("--volume", f"{share}:/share")
    ENGINE.run("podman", "run", "--rm", *CLOSED, *where, image("plugin"), "files", "/share")
    assert (share / "info.json").read_text() == info_json()
    compiled = luajit21.LuaRuntime(unpack_returned_tuples=True).eval("loadstring")
    for plugin in ("openmeter", "openmeter-gate"):
        handler = share / "kong" / "plugins" / plugin / "handler.lua"
        assert callable(compiled(handler.read_text()))
        # Kong has another user, and the group of the folder.
        assert (handler.stat().st_gid, stat.S_IMODE(handler.stat().st_mode)) == (USER, 0o640)


# The services of docker-compose.yml


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The sandbox, the plugin server and syncd, as docker-compose.yml has them, on ports that are free."""
    folder = tmp_path_factory.mktemp("compose")
    ports = {"8888": str(free_port()), "8890": str(free_port())}
    replaced = ports | {"sandbox-token": TOKEN, "0.0.0.0": "127.0.0.1"}
    with ExitStack() as stack:
        started = {}
        for name in ("sandbox", "plugin", "syncd"):
            arguments = of_compose(name, folder, replaced)
            started[name] = stack.enter_context(running(ENGINE, *arguments))
            started[name].wait_until_healthy()
        yield Services(folder, f"http://127.0.0.1:{ports['8888']}", **started)


def test_what_kong_sends_is_billed_once_and_syncd_gets_in_sync(services: Services) -> None:
    expected = Expected()
    # What the plugin server is sent is the file that syncd reads, but for the sandbox's port.
    gateway = Gateway.load(f"{services.url}/api/v1/events")
    drive(services.folder / "plugin-socket" / "openmeter.socket", gateway, REQUESTS, expected)
    wait_for_delivery(services.url, expected)
    assert services.syncd.exec("syncd", "resync", "--wait")
    assert services.syncd.exec("syncd", "plan")  # exit status 0: in sync
    check(json.loads(services.syncd.exec("syncd", "usage", "--output=json")), stats(services.url), expected)
    status = json.loads(services.plugin.exec("openmeter-plugin", "spool", "status", "--output=json"))
    assert status["total"]["backlog"] == 0


@pytest.mark.parametrize("name", ["syncd", "plugin", "sandbox"])
def test_a_service_ends_at_once_when_it_is_stopped(services: Services, name: str) -> None:
    seconds, status = getattr(services, name).stop()
    assert (seconds < AT_ONCE, status) == (True, 0), (seconds, status)
