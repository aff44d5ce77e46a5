"""What the Kubernetes pods run, run here: the same arguments, probes and configurations, other folders."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.spool.destination import write_destination
from syncd.config.settings import load
from tests.deploy.files import ROOT
from tests.deploy.helm import Manifest, pod_spec, render, the
from tests.deploy.test_containers import COMMANDS, TOKEN, running, sandbox_container
from tests.deploy.tools import needs
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.ports import free_port
from tests.harness.process import eventually
from tests.harness.recordings import serialized
from tests.plugin.deliveries import record, spooled
from tests.plugin.events_server import Answer, EventsServer, serving, take_all
from tests.plugin.spools import destination

pytestmark = [needs("helm"), pytest.mark.slow]
API_TOKEN = "token-of-whoever-may-use-the-api"


def sidecar() -> Manifest:
    (container,) = pod_spec(the(render("gateways"), "StatefulSet", "gateway"))["initContainers"]
    found: Manifest = container
    return found


@contextmanager
def plugin_container(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the image's entrypoint with the sidecar's arguments."""
    (folder / "token").write_text(API_TOKEN)
    token_file = "--api-token-file={}"
    arguments: list[str] = sidecar()["args"]
    (token_file,) = (word for word in arguments if word.startswith("--api-token-file="))
    replaced = {
        "--api=0.0.0.0:8096": f"--api=0.0.0.0:{port}",
        token_file: f"--api-token-file={folder / 'token'}",
    }
    assert set(replaced) <= set(arguments)
    script = str(ROOT / "plugin" / "docker-entrypoint.sh")
    environment = {"OPENMETER_PLUGIN_RUN": str(folder), "OPENMETER_PLUGIN_SPOOL": str(folder / "spool")}
    with running(script, *(replaced.get(word, word) for word in arguments), **environment) as process:
        yield process


def http_probe_passes(container: Manifest, probe: str, port: int) -> bool:
    """Ask as a kubelet does: by the pod's address, which is not loopback."""
    url = f"http://127.0.0.1:{port}{container[probe]['httpGet']['path']}"
    try:
        return httpx.get(url, headers={"host": f"10.1.2.3:{port}"}, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def metrics(port: int, token: str | None = None) -> httpx.Response:
    headers = {"host": f"10.1.2.3:{port}"} | ({"authorization": f"Bearer {token}"} if token else {})
    return httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, trust_env=False)


def startup_probe_passes(folder: Path) -> bool:
    """Run the sidecar's probe."""
    python, flag, program = sidecar()["startupProbe"]["exec"]["command"]
    assert [python, flag] == ["python", "-c"]
    program = program.replace("/run/openmeter", str(folder))
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_the_sidecar_passes_its_probes_and_asks_for_the_token(tmp_path: Path) -> None:
    port = free_port()
    strict = render("gateways", "strict")
    (container,) = pod_spec(the(strict, "StatefulSet", "gateway"))["initContainers"]
    with plugin_container(tmp_path, port):
        eventually(lambda: startup_probe_passes(tmp_path), what="the startup probe")
        for probe in ("livenessProbe", "readinessProbe"):
            eventually(partial(http_probe_passes, container, probe, port), what=probe)
        assert metrics(port).status_code == 401
        assert "openmeter_plugin_books_readable 1.0" in metrics(port, API_TOKEN).text


def config_map(name: str) -> dict[str, str]:
    data: dict[str, str] = the(render("gateways"), "ConfigMap", name)["data"]
    return data


def test_the_plugins_configuration_is_one_that_the_plugin_takes() -> None:
    document = yaml.safe_load(config_map("kong")["kong.yml"])
    (entry,) = (plugin for plugin in document["plugins"] if plugin["name"] == "openmeter")
    parse_config(entry["config"] | {"api_token": "token"})


@pytest.fixture
def syncd_folder(tmp_path: Path) -> Path:
    """What is mounted to /etc/syncd."""
    for name in ("syncd", "kong"):
        for file, content in config_map(name).items():
            (tmp_path / file).write_text(content)
    return tmp_path


def syncd_container() -> Manifest:
    (container,) = pod_spec(the(render("gateways"), "Deployment", "syncd"))["containers"]
    found: Manifest = container
    return found


def test_syncd_starts_with_its_configuration_and_passes_its_probes(
    syncd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, port = syncd_container(), free_port()
    variables = {entry["name"]: entry.get("value", API_TOKEN) for entry in container["env"]}
    assert variables["SYNCD_CONFIG"] == "/etc/syncd/syncd.yaml"
    with sandbox_container(syncd_folder) as sandbox:
        variables |= {
            "SYNCD_CONFIG": str(syncd_folder / "syncd.yaml"),
            "STATE_DIRECTORY": str(syncd_folder / "state"),
            "SYNCD_METERING__URL": sandbox,
            "SYNCD_METERING__TOKEN": TOKEN,
            "SYNCD_DAEMON__LISTEN": f"0.0.0.0:{port}",
        }
        with running("syncd", *container["args"], **variables):
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                eventually(partial(http_probe_passes, container, probe, port), what=probe)
            assert metrics(port).status_code == 401
            assert "syncd_last_success_timestamp_seconds" in metrics(port, API_TOKEN).text
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SYNCD_DAEMON__LISTEN")
    assert load(syncd_folder / "syncd.yaml").daemon.listen.port == container["ports"][0]["containerPort"]


# The end of a gateway


def job_that_drains(spool: Path, token: Path) -> subprocess.CompletedProcess[str]:
    """Run the Job's container by the image's entrypoint, on a volume and a token of this machine."""
    job = the(render("gateways", "drain"), "Job", "drain-spool-metering-gateway-2")
    (container,) = pod_spec(job)["containers"]
    replaced = {
        "--token-file=/etc/openmeter-plugin/token/metering-token": f"--token-file={token}",
        "/var/lib/openmeter-plugin/spool": str(spool),
    }
    assert set(replaced) <= set(container["args"])
    return subprocess.run(
        [str(ROOT / "plugin" / "docker-entrypoint.sh"), *(replaced.get(w, w) for w in container["args"])],
        env=os.environ | {"PATH": COMMANDS},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_job_delivers_what_a_gateway_left_behind(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token-of-today")
    with serving(EventsServer(take_all)) as events:
        write_destination(tmp_path / "spool", destination(events.url, token="token-of-yesterday"))
        spooled(tmp_path / "spool", [record(1), record(2, 3)])
        done = job_that_drains(tmp_path / "spool", tmp_path / "token")
        assert done.returncode == 0, done.stderr
        assert len(events.taken) == 3
        assert {post.headers["authorization"] for post in events.posts} == {"Bearer token-of-today"}


def test_the_job_takes_an_orphaned_volume_while_a_gateway_goes_on_with_its_own(tmp_path: Path) -> None:
    serves, orphan = tmp_path / "0", tmp_path / "2"
    serves.mkdir()
    (tmp_path / "token").write_text("token-of-today")
    is_up = False
    events = EventsServer(lambda post: take_all(post) if is_up else Answer(503))
    with serving(events), plugin_container(serves, free_port()):
        eventually(lambda: startup_probe_passes(serves), what="the startup probe")
        asyncio.run(one_request(serves, events.url))
        write_destination(orphan / "spool", destination(events.url, token="token-of-yesterday"))
        spooled(orphan / "spool", [record(1), record(2, 3)])
        is_up = True
        done = job_that_drains(orphan / "spool", tmp_path / "token")
        assert done.returncode == 0, done.stderr
        assert "3 events delivered, 0 left waiting" in done.stdout
        eventually(lambda: len(events.taken) == 4, what="what the gateway has itself")
        assert (serves / "openmeter.socket").exists()


def test_a_pod_that_moves_goes_on_with_its_volume(tmp_path: Path) -> None:
    is_up = False
    events = EventsServer(lambda post: take_all(post) if is_up else Answer(503))
    with serving(events):
        with plugin_container(tmp_path, free_port()):
            eventually(lambda: startup_probe_passes(tmp_path), what="the startup probe")
            asyncio.run(one_request(tmp_path, events.url))
        # The socket and the info are of the old pod; only the volume moves.
        moved = tmp_path / "b"  # a socket's path is short
        moved.mkdir()
        (tmp_path / "spool").rename(moved / "spool")
        is_up = True
        with plugin_container(moved, free_port()):
            eventually(lambda: len(events.taken) == 1, what="the delivery from the other node")


@contextmanager
def hook(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the hook of a gateway without a volume, beside its plugin server."""
    gateway = the(render("gateways", "without-volumes"), "Deployment", "gateway")
    (container,) = pod_spec(gateway)["initContainers"]
    *command, kong = container["lifecycle"]["preStop"]["exec"]["command"]
    assert kong == "--kong-port=8100"
    environment = {"OPENMETER_PLUGIN_SPOOL": str(folder / "spool")}
    with running(*command, f"--kong-port={port}", **environment) as process:
        yield process


async def one_request(folder: Path, endpoint: str) -> None:
    """Have Kong hand over one request."""
    queue = {"initial_retry_delay": 0.01, "max_retry_delay": 0.05, "max_coalescing_delay": 0.0}
    worker = KongWorker(folder / "openmeter.socket")
    plugin = PluginInstance({"ingest_endpoint": endpoint, "queue": queue})
    assert await worker.log(plugin, serialized("authenticated"))
    await worker.close()


def test_the_hook_lets_the_pod_end_when_kong_has_gone_and_everything_is_delivered(tmp_path: Path) -> None:
    is_up = False
    events = EventsServer(lambda _: Answer() if is_up else Answer(503))
    with (
        serving(events),
        plugin_container(tmp_path, free_port()),
        socket.create_server(("127.0.0.1", 0)) as kong,
    ):
        eventually(lambda: startup_probe_passes(tmp_path), what="the startup probe")
        asyncio.run(one_request(tmp_path, events.url))
        eventually(lambda: events.posts, what="a first try")
        with hook(tmp_path, kong.getsockname()[1]) as waiting:
            kong.settimeout(10)
            for _ in range(3):  # it asks for Kong again and again
                kong.accept()[0].close()
            assert waiting.poll() is None
            kong.close()
            posts = len(events.posts)
            eventually(lambda: len(events.posts) > posts + 80, what="more tries")
            assert waiting.poll() is None
            is_up = True
            assert waiting.wait(30) == 0
        assert len(events.taken) == 1


def test_the_hook_does_not_keep_a_pod_that_never_had_a_request(tmp_path: Path) -> None:
    with plugin_container(tmp_path, free_port()):
        eventually(lambda: startup_probe_passes(tmp_path), what="the startup probe")
        with hook(tmp_path, free_port()) as waiting:
            assert waiting.wait(30) == 0
