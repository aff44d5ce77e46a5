"""A real Kong for the benchmarks: services behind key-auth, plugin servers, and its log."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from openmeter_plugin.config.lua_plugin import lua_files
from tests.demo.real_kong import KongMissing
from tests.harness.ports import free_port
from tests.harness.postgres import USER, programs, running_postgres
from tests.harness.process import eventually

KEY = "bench-key"
_INFO = f"{Path(sys.executable).with_name('openmeter-plugin')} info"


@dataclass(frozen=True)
class External:
    """A plugin server for Kong: its socket, and the command that prints which plugins it has."""

    socket: Path
    query: str = _INFO


@dataclass(frozen=True)
class Lua:
    """The Lua plugin for Kong, under a name of its own: the plugin server has the other in the same Kong."""

    folder: Path
    segments: Path
    name: str = "openmeter-lua"

    def write(self) -> None:
        """Lay the files out."""
        place = self.folder / "kong/plugins" / self.name
        place.mkdir(parents=True)
        for name, text in lua_files().items():
            renamed = text.replace("kong.plugins.openmeter.", f"kong.plugins.{self.name}.")
            (place / name).write_text(renamed.replace('name = "openmeter"', f'name = "{self.name}"'))


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
    lua: Lua | None = None,
    directives: Sequence[str] = (),
    postgres: bool = False,
) -> Iterator[tuple[str, int]]:
    """Run a Kong on these cores with a route and its plugins for each path; yields its URL and pid.

    `directives` are further lines of kong.conf; for `postgres` see `started`.
    """
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
    names = sorted({str(plugin["name"]) for plugins in routes.values() for plugin in plugins})
    settings = [f"nginx_worker_processes = {workers}", f"log_level = {log_level}", *directives]
    if servers:
        settings.append(f"pluginserver_names = {', '.join(servers)}")
    for name, server in servers.items():
        settings.append(f"pluginserver_{name}_socket = {server.socket}")
        settings.append(f"pluginserver_{name}_query_cmd = {server.query}")
    plugins = ["key-auth", *names]
    with started(directory, document, plugins, settings, cores=cores, lua=lua, postgres=postgres) as port:
        url = f"http://127.0.0.1:{port}"
        first = url + next(iter(routes))
        eventually(lambda: _answers(first), what="Kong's configuration")
        yield url, int((directory / "prefix/pids/nginx.pid").read_text())


@contextmanager
def started(
    directory: Path,
    document: dict[str, Any],
    plugins: Sequence[str],
    settings: Sequence[str] = (),
    *,
    cores: set[int] | None = None,
    lua: Lua | None = None,
    postgres: bool = False,
) -> Iterator[int]:
    """Run a Kong with this declarative configuration and these settings; yields the proxy's port.

    With `postgres` the configuration is imported into the database that Kong's variables name (KONG_PG_HOST
    and others, see `database`). It must be empty, and is empty again afterwards.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    port = free_port()
    document_file = directory / "kong.yml"
    document_file.write_text(yaml.safe_dump(document))
    lines = [
        *(
            ["database = postgres"]
            if postgres
            else ["database = off", f"declarative_config = {directory}/kong.yml"]
        ),
        f"plugins = {', '.join(plugins)}",
        f"proxy_listen = 127.0.0.1:{port}",
        "proxy_access_log = off",
        "admin_listen = off",
        "status_listen = off",
        "admin_gui_listen = off",
        "anonymous_reports = off",
        *settings,
    ]
    if os.geteuid() == 0:
        lines.append("nginx_user = root root")
    environment = dict(os.environ)
    if lua is not None:
        lines.append(f"lua_package_path = {lua.folder}/?.lua;;")
        environment["OPENMETER_PLUGIN_SEGMENTS"] = str(lua.segments)
    (directory / "kong.conf").write_text("\n".join(lines) + "\n")
    prefix = directory / "prefix"
    at = ["-p", str(prefix), "-c", str(directory / "kong.conf")]
    prepared = [["migrations", "bootstrap"], ["config", "db_import", str(document_file)]] if postgres else []
    with on_cores(cores or os.sched_getaffinity(0)):
        for command in [*prepared, ["start"]]:
            run = subprocess.run(["kong", *command, *at], capture_output=True, text=True, env=environment)
            if run.returncode:
                raise KongMissing(f"kong {command[0]} failed: {run.stderr.strip()}")
            if "already bootstrapped" in run.stdout + run.stderr:
                raise KongMissing("the database that KONG_PG_DATABASE names is not empty")
    try:
        yield port
    finally:
        subprocess.run(["kong", "stop", "-p", str(prefix)], capture_output=True)
        if postgres:
            run = subprocess.run(
                ["kong", "migrations", "reset", "--yes", *at], capture_output=True, text=True
            )
            if run.returncode:
                raise KongMissing(f"kong migrations reset failed: {run.stderr.strip()}")


@contextmanager
def database() -> Iterator[None]:
    """Have Kong's variables name a database, on a new PostgreSQL if they name none."""
    if "KONG_PG_HOST" in os.environ:
        yield
        return
    folder = programs()
    if folder is None:
        raise KongMissing("there is no PostgreSQL in the PATH, and KONG_PG_HOST names none")
    with running_postgres(folder, auth="trust") as server:  # a Kong that is built by hand may lack SCRAM
        named = {
            "KONG_PG_HOST": "127.0.0.1",
            "KONG_PG_PORT": str(server.port),
            "KONG_PG_USER": USER,
            "KONG_PG_DATABASE": server.new_database().rpartition("/")[2],
        }
        os.environ.update(named)
        yield


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
