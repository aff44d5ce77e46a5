"""`make screenshot`: takes docs/images/dashboard.png from a running demo, with the sandbox's data.

The demo's traffic goes through a plugin server into the sandbox, together with some usage of a subject that
no source names. The daemon syncs, and Chromium takes the overview in the light theme.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import httpx
import yaml

from openmeter_plugin.api.access import TOKEN_VARIABLE
from tests.demo.__main__ import (
    APPLICATIONS,
    TOKEN,
    drive,
    running_sandbox,
    wait_for_delivery,
)
from tests.demo.gateway import Gateway
from tests.demo.traffic import Expected
from tests.harness.process import eventually, plugin_server

IMAGE: Final = Path(__file__).parents[2] / "docs" / "images" / "dashboard.png"
REQUESTS: Final = 4_000
UNKNOWN: Final = 132
WIDTH, HEIGHT = 1200, 1040
_BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Take the picture."""
    with ExitStack() as stack:
        # The dashboard shows the paths of files, so the folder has a name that is fit to be seen.
        directory = Path(tempfile.gettempdir()) / "kong-openmeter"
        directory.mkdir()
        stack.callback(shutil.rmtree, directory)
        sandbox = stack.enter_context(running_sandbox(directory))
        gateway = Gateway.load(f"{sandbox}/api/v1/events")
        api = f"127.0.0.1:{free_port()}"
        server = stack.enter_context(
            plugin_server(directory, "--api", api, environment={TOKEN_VARIABLE: TOKEN * 2})
        )
        expected = Expected()
        drive(server.socket, gateway, REQUESTS, expected)
        wait_for_delivery(sandbox, expected)
        send_unknown(sandbox)
        gateway.write(directory / "kong.yml")
        shutil.copy(APPLICATIONS, directory / "applications.json")
        dashboard = stack.enter_context(running_daemon(directory, sandbox, api))
        take(dashboard, IMAGE)
    print(f"{IMAGE}: {IMAGE.stat().st_size // 1024} KiB")


def send_unknown(sandbox: str) -> None:
    """Send usage of a subject that no source names."""
    batch = [
        {
            "specversion": "1.0",
            "id": f"unknown-{number}",
            "source": "kong",
            "type": "kong.api_request",
            "subject": "consumer:old-mobile-app",
            "data": {"status": 200},
        }
        for number in range(UNKNOWN)
    ]
    headers = {
        "authorization": f"Bearer {TOKEN}",
        "content-type": "application/cloudevents-batch+json",
    }
    httpx.post(f"{sandbox}/api/v1/events", json=batch, headers=headers, trust_env=False).raise_for_status()


@contextmanager
def running_daemon(directory: Path, sandbox: str, api: str) -> Iterator[str]:
    """Run `syncd run` until its first two runs are over; yields the dashboard's URL."""
    listen = f"127.0.0.1:{free_port()}"
    config = {
        "sources": [
            {"type": "declarative-file", "name": "kong", "path": "kong.yml"},
            {"type": "applications-file", "name": "dev-portal", "path": "applications.json"},
        ],
        "metering": {"url": sandbox, "token": TOKEN},
        "gateways": [{"name": "gateway-1", "url": f"http://{api}", "token": TOKEN * 2}],
        "schedule": {"interval": "1h"},
        "daemon": {"listen": listen},
    }
    (directory / "syncd.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "SYNCD_CONFIG": str(directory / "syncd.yaml"),
        "STATE_DIRECTORY": str(directory / "state"),
    }
    syncd = str(Path(sys.executable).with_name("syncd"))
    with (directory / "syncd.log").open("wb") as log:
        process = subprocess.Popen([syncd, "run"], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://{listen}"
        eventually(lambda: answers(f"{url}/readyz"), what="the daemon's first run")
        subprocess.run([syncd, "resync", "--wait"], env=environment, check=True, stdout=subprocess.DEVNULL)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    """Say whether something answers 200."""
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def take(url: str, image: Path) -> None:
    """Have Chromium write a picture of a page."""
    program = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit("make screenshot needs Chromium")
    image.parent.mkdir(exist_ok=True)
    options = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--no-sandbox"] * (os.geteuid() == 0)
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image}"]
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *options, f"--user-data-dir={profile}", f"{url}/"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
