"""Access to the HTTP API: off by default, then with the token only."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from openmeter_plugin.api.access import TOKEN_VARIABLE
from tests.harness.process import eventually, plugin_server
from tests.plugin.operations_api import ADMIN_TOKEN, EVENTS_TOKEN, Api, address_of, api

pytestmark = pytest.mark.slow

# Off by default, access


def test_without_the_option_nothing_of_the_api_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from contextlib import ExitStack
from pathlib import Path
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.api.runtime import run
run(DeliveryOptions(Path({str(tmp_path)!r})), None, until_empty=True)
print(sorted({{"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "token", "message"),
    [
        ("serve", ["--api", "127.0.0.1:0"], None, "over TCP a token is required"),
        ("deliver", ["--api", "127.0.0.1:0"], None, "over TCP a token is required"),
        ("serve", ["--api", "0.0.0.0:0"], None, "over TCP a token is required"),
        ("serve", ["--api", "127.0.0.1:0"], "", f"{TOKEN_VARIABLE} is empty"),
        ("serve", ["--api", "unix:{dir}/api"], "", f"{TOKEN_VARIABLE} is empty"),
        ("serve", ["--api", "127.0.0.1:0"], "short", "must have at least 16"),
        ("serve", ["--api", "8096"], ADMIN_TOKEN, "neither host:port"),
        ("serve", ["--api", "127.0.0.1:0", "--api-token-file", "{dir}/nothing"], None, "No such file"),
    ],
)
def test_insecure_options_are_refused_at_the_start(
    tmp_path: Path, command: str, arguments: list[str], token: str | None, message: str
) -> None:
    (tmp_path / "spool").mkdir()
    words = [word.format(dir=tmp_path) for word in arguments]
    words += ["--socket", str(tmp_path / "s")] if command == "serve" else []
    environment = os.environ | ({} if token is None else {TOKEN_VARIABLE: token})
    result = subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", command, "--spool", str(tmp_path / "spool"), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )
    assert result.returncode != 0
    assert result.stderr.startswith("openmeter-plugin: --api: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_unix_socket_needs_no_token_and_only_its_owner_may_connect(tmp_path: Path) -> None:
    with plugin_server(tmp_path, "--api", f"unix:{tmp_path}/api") as server:
        eventually((tmp_path / "api").exists, what="listening")
        transport = httpx.HTTPTransport(uds=str(tmp_path / "api"))
        with httpx.Client(transport=transport, base_url="http://any.name", timeout=15) as client:
            assert client.get("/v1/spool").json()["total"]["backlog"] == 0
        assert (tmp_path / "api").stat().st_mode & 0o777 == 0o600
        server.stop()
        assert not (tmp_path / "api").exists()


def test_everything_except_the_probes_needs_the_token(running_api: Api) -> None:
    paths = running_api.get("/openapi.json")["paths"]
    for path, methods in paths.items():
        for method in methods:
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {ADMIN_TOKEN}"}):
                answer = httpx.request(method, running_api.url + path.replace("{number}", "1"), headers=given)
                if path in {"/healthz", "/readyz"}:
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert "Authorization: Bearer" in answer.json()["detail"]


def test_the_openapi_document_needs_the_token(running_api: Api) -> None:
    for path in ("/openapi.json", "/docs"):
        assert httpx.get(f"{running_api.url}{path}").status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8096", "127.0.0.1.evil.example", "[::2]", ""])
def test_other_host_names_are_refused_on_loopback(running_api: Api, host: str) -> None:
    for path in ("/v1/spool", "/healthz"):
        answer = running_api.client.get(path, headers={"host": host})
        assert answer.status_code in {400, 421}
        assert "backlog" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8096", "127.0.0.1", "127.0.0.1:1", "[::1]:8096"])
def test_names_and_addresses_of_loopback_are_accepted(running_api: Api, host: str) -> None:
    assert running_api.client.get("/healthz", headers={"host": host}).status_code == 200


def test_a_replaced_token_file_takes_effect_at_once(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "token").write_text("the-first-token-of-all\n")
    arguments = ("--api", "127.0.0.1:0", "--api-token-file", str(tmp_path / "token"))
    with plugin_server(tmp_path, *arguments) as server:
        url = address_of(server)

        def status(token: str) -> int:
            return httpx.get(
                f"{url}/v1/spool", headers={"authorization": f"Bearer {token}"}, timeout=15
            ).status_code

        assert status("the-first-token-of-all") == 200
        (tmp_path / "token").write_text("the-second-token-of-all\n")
        assert (status("the-first-token-of-all"), status("the-second-token-of-all")) == (401, 200)
        (tmp_path / "token").unlink()
        assert status("the-second-token-of-all") == 503


def test_no_response_contains_a_secret(running_api: Api) -> None:
    paths = running_api.get("/openapi.json")["paths"]
    answers = [running_api.client.get(path.replace("{number}", "1")) for path in paths]
    text = "".join(answer.text + str(answer.headers) for answer in answers)
    assert ADMIN_TOKEN not in text
    assert EVENTS_TOKEN not in text
    assert ADMIN_TOKEN not in running_api.server.log_text()


# Operation


def test_deliver_serves_the_api_too(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    command = [sys.executable, "-m", "openmeter_plugin", "deliver", "--spool", str(tmp_path / "spool")]
    process = subprocess.Popen([*command, "--api", f"unix:{tmp_path}/api"], stderr=subprocess.DEVNULL)
    try:
        eventually((tmp_path / "api").exists, what="listening")
        transport = httpx.HTTPTransport(uds=str(tmp_path / "api"))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=15) as client:
            eventually(lambda: client.get("/readyz").status_code == 200, what="readiness")
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not (tmp_path / "api").exists()


def test_idle_connections_do_not_block_others(running_api: Api) -> None:
    host, port = running_api.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(80)]
    try:
        for _ in range(3):
            assert httpx.get(f"{running_api.url}/healthz", timeout=15).status_code == 200
    finally:
        for connection in held:
            connection.close()


# HEAD


def test_head_is_answered_as_get_without_a_body(tmp_path: Path) -> None:
    with api(tmp_path, history=False) as running:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/spool"):
            answer = running.client.head(path)
            assert (answer.status_code, answer.content) == (200, b""), path
            assert int(answer.headers["content-length"]) > 0
            assert answer.headers["content-type"] == running.client.get(path).headers["content-type"]
        with httpx.Client(base_url=running.url) as stranger:
            assert stranger.head("/healthz").status_code == 200
            assert stranger.head("/metrics").status_code == 401


# Connections


def test_a_burst_of_silent_connections_takes_no_descriptor_that_the_delivery_needs(tmp_path: Path) -> None:
    limit = 256
    with api(tmp_path, history=False) as running, ExitStack() as stack:
        delivery = eventually(lambda: running.server.child("delivery") or 0, what="the delivery")
        assert running.client.get("/healthz").status_code == 200
        resource.prlimit(delivery, resource.RLIMIT_NOFILE, (limit, limit))
        host, port = running.url.removeprefix("http://").split(":")
        os.kill(delivery, signal.SIGSTOP)  # so that it meets all of them at once
        for _ in range(1_000):
            silent = stack.enter_context(socket.socket())
            silent.setblocking(False)
            silent.connect_ex((host, int(port)))
        os.kill(delivery, signal.SIGCONT)
        most, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            most = max(most, len(list(Path(f"/proc/{delivery}/fd").iterdir())))
        assert most < limit * 0.9
        assert running.client.get("/healthz").status_code == 200
