"""Containers of the two images, run as docker-compose.yml has them.

All are on the host's network, and a volume is a folder of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.deploy.files import ROOT, mounts, service
from tests.harness.process import eventually
from tests.images.engine import Engine, EngineError, image

USER: Final = 10001
CLOSED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)
"""What compose's `read_only`, `tmpfs`, `cap_drop` and `security_opt` are for podman."""


@dataclass(frozen=True)
class Container:
    """A running container."""

    engine: Engine
    id: str

    def exec(self, *command: str, seconds: float = 60) -> str:
        """Run a command in it and return what that printed; raises EngineError."""
        return self.engine.run("podman", "exec", self.id, *command, seconds=seconds)

    def start(self, *command: str) -> None:
        """Run a command in it that goes on."""
        self.engine.run("podman", "exec", "--detach", self.id, *command)

    def is_healthy(self) -> bool:
        """Run its healthcheck."""
        command = ["podman", "healthcheck", "run", self.id]
        return subprocess.run(command, env=self.engine.environment, capture_output=True).returncode == 0

    def wait_until_healthy(self) -> None:
        """Wait for its healthcheck to succeed; raises with its log if it does not."""
        try:
            eventually(self.is_healthy, seconds=60, what="health")
        except AssertionError as error:
            raise EngineError(f"{error}: {self.engine.run('podman', 'logs', self.id)}") from None

    def run_to_its_end(self) -> int:
        """Start it and wait; returns its exit status."""
        self.engine.run("podman", "start", self.id)
        return int(self.engine.run("podman", "wait", self.id))

    def stop(self) -> tuple[float, int]:
        """Send SIGTERM; returns the seconds until it has ended, and its exit status."""
        started = time.monotonic()
        self.engine.run("podman", "stop", "--time", "30", self.id)
        seconds = time.monotonic() - started
        return seconds, int(self.engine.run("podman", "inspect", "--format", "{{.State.ExitCode}}", self.id))


@contextmanager
def running(engine: Engine, *arguments: str) -> Iterator[Container]:
    """Run a container until the end of the block."""
    found = Container(engine, engine.run("podman", "run", "--detach", *arguments).strip())
    try:
        yield found
    finally:
        engine.run("podman", "rm", "--force", "--time", "0", found.id)


def volume(folder: Path) -> Path:
    """Make a folder that the images' user may write, as a new volume is."""
    folder.mkdir(mode=0o750, exist_ok=True)
    os.chown(folder, USER, USER)
    return folder


def of_compose(name: str, folder: Path, replaced: Mapping[str, str]) -> list[str]:
    """Return podman's arguments for a service of docker-compose.yml.

    `replaced` maps what cannot be the same on the host's network, such as ports, to what it is here. Volumes
    become folders below `folder`.
    """
    wanted = service(name)
    assert (wanted["read_only"], wanted["tmpfs"], wanted["cap_drop"]) == (True, ["/tmp"], ["ALL"])

    def here(text: str) -> str:
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    arguments = [*CLOSED, "--network", "host", "--add-host", "sandbox:127.0.0.1"]
    for variable, value in wanted.get("environment", {}).items():
        arguments += ["--env", f"{variable}={here(value)}"]
    for target, source in mounts(name).items():
        is_file = source.startswith(".")
        arguments += ["--volume", f"{ROOT / source if is_file else volume(folder / source)}:{target}"]
    if "healthcheck" in wanted:
        kind, *check = wanted["healthcheck"]["test"]
        assert kind == "CMD"
        arguments += ["--health-cmd", json.dumps([here(word) for word in check])]
        arguments += ["--health-interval", "disable"]  # the tests run it
    own = image({"sandbox": "syncd"}.get(name, name))
    return [*arguments, own, *(here(word) for word in wanted["command"])]
