"""What the images promise, and how they run: as docker-compose.yml's services, and as an init container."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from lupa import luajit21

from openmeter_plugin import __version__
from openmeter_plugin.config.schema import info_json
from openmeter_plugin.spool.destination import write_destination
from tests.demo import real_kong
from tests.demo.__main__ import APPLICATIONS, TOKEN, check, drive, stats, wait_for_delivery
from tests.demo.gateway import Gateway
from tests.demo.traffic import Expected
from tests.deploy.files import service
from tests.deploy.helm import Manifest, render, rendered_with, the
from tests.deploy.tools import needs
from tests.harness.ports import free_port
from tests.harness.process import eventually, takes_connections
from tests.images.containers import CLOSED, USER, Container, of_compose, running, volume
from tests.images.engine import BASE, NAMES, Engine, image, missing_programs
from tests.images.pods import playing
from tests.plugin.deliveries import record, spooled
from tests.plugin.events_server import EventsServer, serving, take_all
from tests.plugin.spools import destination

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
    """Whether there is nothing to try. Images of an older checkout would fail what has changed since."""
    asked_for = os.environ.get("IMAGES") == "yes"
    return not asked_for or bool(missing_programs()) or not all(ENGINE.has(image(name)) for name in NAMES)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_images_are_missing(), reason="needs new images: run make images-test"),
]
both = pytest.mark.parametrize("name", NAMES)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


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


def test_syncds_image_has_what_a_postgresql_needs() -> None:
    program = "import psycopg, sqlalchemy; print(psycopg.pq.version() > 0, psycopg.pq.__impl__)"
    command = ("--entrypoint", "python", image("syncd"), "-c", program)
    assert ENGINE.run("podman", "run", "--rm", *CLOSED, *command).split() == ["True", "python"]


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


def test_what_kong_sends_is_billed_once_and_syncd_gets_in_sync(services: Services, tmp_path: Path) -> None:
    expected = Expected()
    # What the plugin server is sent is the file that syncd reads, but for the sandbox's port.
    gateway = Gateway.load(f"{services.url}/api/v1/events")
    shared = services.folder / "plugin-socket"
    drive(shared / "openmeter.socket", gateway, REQUESTS, expected)
    if shutil.which("kong") is not None:
        with real_kong.upstream() as upstream:
            gateway = Gateway.load(f"{services.url}/api/v1/events", upstream)
            query = service("kong")["environment"]["KONG_PLUGINSERVER_OPENMETER_QUERY_CMD"]
            query = query.replace("/run/openmeter", str(shared))
            with real_kong.kong(tmp_path, gateway, shared / "openmeter.socket", TOKEN, query=query) as proxy:
                real_kong.drive(proxy, gateway, REQUESTS, expected, lambda: None)
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


# The pods of the chart


def of_the_chart(url: str, api: str, daemon: str) -> list[Manifest]:
    """The chart's objects for the demo's gateway, with addresses of this machine."""
    gateway = Gateway.load(f"{url}/api/v1/events")
    sources = [
        {"type": "declarative-file", "path": "kong.yml"},
        {"type": "applications-file", "path": "applications.json"},
    ]
    syncd = {
        "sources": sources,
        "metering": {"url": url},
        "daemon": {"listen": daemon},
        "gateways": [{"name": "gateway-0", "url": f"http://{api}"}],
    }
    values = {
        "secret": {"meteringToken": TOKEN, "syncdToken": "s" * 16, "pluginApiToken": "p" * 16},
        "gateway": {"config": gateway.document},
        "syncd": {"config": syncd, "files": {"applications.json": APPLICATIONS.read_text()}},
    }
    return rendered_with(values, "gateways")


@needs("helm")
def test_the_pods_of_a_gateway_and_of_syncd_bill_what_kong_sends(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    port, api, daemon = str(free_port()), f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    url, expected = f"http://127.0.0.1:{port}", Expected()
    manifests = of_the_chart(url, api, daemon)
    gateway, syncd = the(manifests, "StatefulSet", "gateway"), the(manifests, "Deployment", "syncd")
    sandbox = ("sandbox", "--port", port, "--db", "/tmp/db", "--token", TOKEN)
    with (
        running(ENGINE, *CLOSED, "--network", "host", image("syncd"), *sandbox),
        playing(ENGINE, manifests, gateway, tmp_path / "gateway", {"0.0.0.0:8096": api}) as beside_kong,
        playing(ENGINE, manifests, syncd, tmp_path / "syncd", {}) as pod,
    ):
        socket = tmp_path / "gateway" / "socket" / "openmeter.socket"
        eventually(lambda: takes_connections(socket), seconds=60, what="the plugin server")
        drive(socket, Gateway.load(f"{url}/api/v1/events"), REQUESTS, expected)
        wait_for_delivery(url, expected)
        eventually(lambda: answers(f"http://{daemon}/healthz"), seconds=60, what="syncd")
        pod["syncd"].exec("syncd", "resync", "--wait")
        check(json.loads(pod["syncd"].exec("syncd", "usage", "--output=json")), stats(url), expected)
        # syncd reads the gateway's books with the token of the Secret.
        pod["syncd"].exec("syncd", "audit")
        assert set(beside_kong) == {"plugin"}


@needs("helm")
def test_the_job_of_the_chart_delivers_an_orphaned_volume(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    manifests = render("gateways", "drain")
    job = the(manifests, "Job", "drain-spool-metering-gateway-2")
    with (
        serving(EventsServer(take_all)) as events,
        playing(ENGINE, manifests, job, tmp_path / "job", {}, start=False) as pod,
    ):
        spool = tmp_path / "job" / "spool" / "spool"
        write_destination(spool, destination(events.url, token="token-of-yesterday"))
        spooled(spool, [record(1), record(2, 3)])
        for path in [spool, *spool.rglob("*")]:
            os.chown(path, USER, USER)
        assert pod["drain"].run_to_its_end() == 0
        assert len(events.taken) == 3
        assert {post.headers["authorization"] for post in events.posts} == {"Bearer metering-token-of-a-test"}
