"""A real Kong for the benchmarks: services behind key-auth, plugin servers, and its log."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.demo.real_kong import KongMissing
from tests.harness.ports import free_port
from tests.harness.process import eventually

KEY = "bench-key"
_INFO = f"{Path(sys.executable).with_name('openmeter-plugin')} info"


@dataclass(frozen=True)
class External:
    """A plugin server for Kong: its socket, and the command that prints which plugins it has."""

    socket: Path
    query: str = _INFO


@contextmanager
def kong(
    directory: Path,
    upstream: str,
    routes: Mapping[str, list[dict[str, Any]]],
    servers: Mapping[str, External],
    *,
    workers: int = 1,
    log_level: str = "error",
    cores: set[int] | None = None,
) -> Iterator[tuple[str, int]]:
    """Run a Kong on these cores with a route and its plugins for each path; yields its URL and pid."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    port = free_port()
    listed = [
        {"name": f"r{number}", "paths": [path], "plugins": plugins}
        for number, (path, plugins) in enumerate(routes.items())
    ]
    document = {
        "_format_version": "3.0",
        "services": [{"name": "s", "url": upstream, "routes": listed}],
        "consumers": [{"username": "c", "keyauth_credentials": [{"key": KEY}]}],
        "plugins": [{"name": "key-auth"}],
    }
    (directory / "kong.yml").write_text(yaml.safe_dump(document))
    names = {str(plugin["name"]) for plugins in routes.values() for plugin in plugins}
    lines = [
        "database = off",
        f"declarative_config = {directory}/kong.yml",
        f"plugins = {', '.join(sorted({'key-auth'} | names))}",
        f"proxy_listen = 127.0.0.1:{port}",
        "proxy_access_log = off",
        "admin_listen = off",
        "status_listen = off",
        "admin_gui_listen = off",
        "anonymous_reports = off",
        f"nginx_worker_processes = {workers}",
        f"log_level = {log_level}",
        f"pluginserver_names = {', '.join(servers)}",
    ]
    for name, server in servers.items():
        lines.append(f"pluginserver_{name}_socket = {server.socket}")
        lines.append(f"pluginserver_{name}_query_cmd = {server.query}")
    if os.geteuid() == 0:
        lines.append("nginx_user = root root")
    (directory / "kong.conf").write_text("\n".join(lines) + "\n")
    prefix = directory / "prefix"
    with on_cores(cores or os.sched_getaffinity(0)):
        started = subprocess.run(
            ["kong", "start", "-p", str(prefix), "-c", str(directory / "kong.conf")],
            capture_output=True,
            text=True,
        )
    if started.returncode:
        raise KongMissing(f"kong does not start: {started.stderr.strip()}")
    url = f"http://127.0.0.1:{port}"
    first = url + next(iter(routes))
    try:
        eventually(lambda: _answers(first), what="Kong's configuration")
        yield url, int((prefix / "pids" / "nginx.pid").read_text())
    finally:
        subprocess.run(["kong", "stop", "-p", str(prefix)], capture_output=True)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == httpx.codes.UNAUTHORIZED
    except httpx.TransportError:
        return False


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Run on these cores, and start what is started meanwhile there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def process(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Run one of our modules beside; yields the first line that it prints, and its pid."""
    started = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    assert started.stdout
    try:
        yield started.stdout.readline().strip(), started.pid
    finally:
        started.kill()
        started.wait()
        started.stdout.close()
