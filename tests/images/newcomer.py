"""``make images-newcomer``: from an empty container of the base image to a bill, timed.

Installs the wheel with syncd into a container that has Python and nothing else, runs the sandbox and the
plugin server there, replays the demo's traffic through the server's socket, has syncd make the customers, and
checks that every request is billed once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from tests.demo.__main__ import (
    APPLICATIONS,
    REQUESTS,
    TOKEN,
    DemoFailed,
    check,
    drive,
    stats,
    wait_for_delivery,
)
from tests.demo.gateway import Gateway
from tests.demo.traffic import Expected
from tests.harness.ports import free_port
from tests.harness.process import eventually, takes_connections
from tests.images.containers import Container, running
from tests.images.engine import BASE, Engine, EngineError, missing_programs
from tests.newcomer import report
from tests.packaging.distributions import ROOT, build

_BIN = "/opt/kong-openmeter/bin"
_INSIDE = "/srv/newcomer"
"""Where the container has the folder of the trial."""


def main() -> int:
    """Go the way and print how long each step took; returns the exit status."""
    if missing := missing_programs():
        print(f"make images-newcomer: left out; needs {', '.join(missing)}, which are packages of Debian")
        return 0
    engine = Engine()
    try:
        engine.make_base()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            mounted = ("--network", "host", "--volume", f"{folder}:{_INSIDE}", "--workdir", _INSIDE)
            with running(engine, *mounted, BASE, "sleep", "infinity") as container:
                print(report(_way(container, Path(folder))), end="")
    except (DemoFailed, EngineError) as error:
        print(f"make images-newcomer: {error}", file=sys.stderr)
        return 1
    return 0


def _way(container: Container, folder: Path) -> list[tuple[str, float]]:
    """Take each step; returns them with their seconds."""
    wheel = build(ROOT, folder, "wheel")["wheel"].name
    url, expected = f"http://127.0.0.1:{free_port()}", Expected()
    gateway = Gateway.load(f"{url}/api/v1/events")
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("install", partial(_install, container, wheel)),
        ("start", partial(_start, container, folder, url)),
        ("replay", partial(drive, folder / "openmeter.socket", gateway, REQUESTS, expected)),
        ("deliver", partial(wait_for_delivery, url, expected)),
        ("sync", partial(_sync, container, folder, gateway, url)),
        ("check", lambda: check(_usage(container), stats(url), expected)),
    )
    taken = []
    for name, step in steps:
        started = time.monotonic()
        step()
        taken.append((name, time.monotonic() - started))
    billed = sum(expected.requests.values())
    print(f"Every one of the {billed:,} metered requests is counted exactly once.")
    return taken


def _install(container: Container, wheel: str) -> None:
    container.exec("python3", "-m", "venv", "/opt/kong-openmeter")
    container.exec(
        f"{_BIN}/pip", "install", "--quiet", "--no-cache-dir", f"{_INSIDE}/{wheel}[syncd]", seconds=500
    )


def _start(container: Container, folder: Path, url: str) -> None:
    port = url.rpartition(":")[2]
    sandbox = ("sandbox", "--port", port, "--token", TOKEN, "--db", f"{_INSIDE}/sandbox.sqlite3")
    container.start(f"{_BIN}/syncd", *sandbox)
    where = ("--socket", f"{_INSIDE}/openmeter.socket", "--spool", "/var/lib/openmeter-plugin/spool")
    container.start(f"{_BIN}/openmeter-plugin", "serve", *where)
    eventually(lambda: takes_connections(folder / "openmeter.socket"), seconds=60, what="the plugin server")


def _sync(container: Container, folder: Path, gateway: Gateway, url: str) -> None:
    gateway.write(folder / "kong.yml")
    (folder / "applications.json").write_text(APPLICATIONS.read_text())
    config = {
        "sources": [
            {"type": "declarative-file", "path": "kong.yml"},
            {"type": "applications-file", "path": "applications.json"},
        ],
        "metering": {"dialect": "openmeter-v1", "url": url, "token": TOKEN},
        "mapping": {"group_by": "tag"},
    }
    (folder / "syncd.yaml").write_text(yaml.safe_dump(config))
    _syncd(container, "apply", "--yes")
    _syncd(container, "plan")  # exit status 0: nothing left to do


def _syncd(container: Container, *arguments: str) -> str:
    variables = (f"SYNCD_CONFIG={_INSIDE}/syncd.yaml", f"STATE_DIRECTORY={_INSIDE}/state")
    return container.exec("env", *variables, f"{_BIN}/syncd", *arguments)


def _usage(container: Container) -> dict[str, object]:
    found: dict[str, object] = json.loads(_syncd(container, "usage", "--sort=name", "--output=json"))
    return found


if __name__ == "__main__":
    sys.exit(main())
