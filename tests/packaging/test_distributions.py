"""What is in the wheel and in the source distribution, and that it runs in a clean environment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from openmeter_plugin import __version__
from openmeter_plugin.config.schema import plugin_info
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.ports import free_port
from tests.harness.process import eventually
from tests.harness.recordings import serialized
from tests.packaging.distributions import ROOT, build, files_of_wheel, unpacked

pytestmark = pytest.mark.slow

VERSION = __version__
PACKAGES = {"openmeter_plugin": ROOT / "plugin" / "openmeter_plugin", "syncd": ROOT / "syncd"}
NOT_IN_THE_WHEEL = {"syncd/Dockerfile"}
MADE = {"openmeter_plugin/pdk_dir/openmeter.py"}
"""Placed by the build: the one file that stock kong-pdk may see."""


def files_of_the_packages() -> set[str]:
    found = set()
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{name}/{path.relative_to(folder)}")
    return found


# What is in them


def test_the_wheel_has_every_file_of_the_packages_and_no_other(built: dict[str, Path]) -> None:
    in_wheel = {path for path in files_of_wheel(built["wheel"]) if ".dist-info/" not in path}
    assert in_wheel == files_of_the_packages() - NOT_IN_THE_WHEEL | MADE


def test_the_wheel_tells_type_checkers_that_it_is_typed(built: dict[str, Path]) -> None:
    assert {f"{name}/py.typed" for name in PACKAGES} <= files_of_wheel(built["wheel"])


def test_the_wheel_has_the_dashboards_templates_and_styles(built: dict[str, Path]) -> None:
    files = files_of_wheel(built["wheel"])
    for folder, kind in (("templates", ".html"), ("static", ".css")):
        assert [path for path in files if re.fullmatch(rf"syncd/dashboard/{folder}/[\w./-]+\{kind}", path)]


def test_the_wheel_has_the_licence_and_no_tests(built: dict[str, Path]) -> None:
    files = files_of_wheel(built["wheel"])
    assert f"kong_openmeter-{VERSION}.dist-info/licenses/LICENSE" in files
    assert not [path for path in files if "test" in Path(path).parts[0]]


def test_the_source_distribution_builds_the_same_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    source = unpacked(built["sdist"], tmp_path / "sdist")
    again = build(source, tmp_path / "dist", "wheel")["wheel"]
    assert files_of_wheel(again) == files_of_wheel(built["wheel"])


def test_the_source_distribution_has_what_a_packager_needs(built: dict[str, Path], tmp_path: Path) -> None:
    source = unpacked(built["sdist"], tmp_path)
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "kong.yml"]
    wanted += [".ci/constraints.txt", "docs/examples/syncd.yaml", "tests/conftest.py", "docker-compose.yml"]
    assert [path for path in wanted if not (source / path).is_file()] == []
    left = [path for path in source.rglob("*") if path.suffix in {".pyc", ".sqlite3"} or path.name == ".git"]
    kept = source / "tests" / "data" / "upgrade"
    assert [path for path in left if kept not in path.parents] == []


# Whether it runs


def run(bin_folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the clean environment, which knows nothing of this one."""
    clean = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": "/nonexistent", **variables}
    return subprocess.run(
        [str(bin_folder / command[0]), *command[1:]],
        env=clean,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("openmeter-plugin", "--help"),
        ("openmeter-plugin", "schema-lua"),
        ("openmeter-plugin", "spool", "status", "--help"),
        ("syncd", "--help"),
        ("syncd", "sandbox", "--help"),
        ("python", "-m", "syncd.sandbox", "--help"),
        ("python", "-m", "openmeter_plugin", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_runs_in_a_clean_environment(bin_folder: Path, command: tuple[str, ...]) -> None:
    done = run(bin_folder, *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("openmeter-plugin", "--help"),
        ("openmeter-plugin", "schema-lua"),
        ("syncd", "--help"),
        ("syncd", "sandbox", "--help"),
        ("python", "-m", "syncd.sandbox", "--help"),
    ],
    ids=" ".join,
)
def test_the_plugin_server_and_the_sandbox_need_no_extra(plugin_only: Path, command: tuple[str, ...]) -> None:
    done = run(plugin_only, *command)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("syncd", "plan"), "syncd"),
        (("syncd", "run"), "syncd"),
        (("syncd", "audit"), "syncd"),
        (("syncd", "meters", "plan"), "syncd"),
        (("openmeter-plugin", "pdk-dir"), "kong-pdk"),
    ],
)
def test_a_command_whose_extra_is_missing_says_how_to_install_it(
    plugin_only: Path, command: tuple[str, ...], extra: str
) -> None:
    done = run(plugin_only, *command)
    assert done.returncode == 1
    assert done.stderr.endswith(f"is not installed; run: pip install 'kong-openmeter[{extra}]'\n")
    assert done.stderr.count("\n") == 1


def test_both_programs_say_the_version(bin_folder: Path) -> None:
    assert run(bin_folder, "openmeter-plugin", "--version").stdout == f"openmeter-plugin {VERSION}\n"
    assert run(bin_folder, "syncd", "--version").stdout == f"syncd {VERSION}\n"


def test_kong_gets_the_same_info_from_the_installed_plugin(bin_folder: Path) -> None:
    assert json.loads(run(bin_folder, "openmeter-plugin", "info").stdout) == plugin_info()


def test_the_stock_plugin_server_finds_one_file_and_it_is_the_plugin(bin_folder: Path) -> None:
    folder = Path(run(bin_folder, "openmeter-plugin", "pdk-dir").stdout.strip())
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".py") == ["openmeter.py"]
    (entry,) = metadata.entry_points(group="console_scripts", name="kong-python-pluginserver")
    program = f"import {entry.module} as module; module.{entry.attr}()"
    done = run(bin_folder, "python", "-c", program, "-d", str(folder), "--dump-all-plugins")
    assert json.loads(done.stdout)[0]["Name"] == "openmeter", done.stderr


@contextmanager
def running(bin_folder: Path, folder: Path, *command: str) -> Iterator[None]:
    """Run a command of the clean environment until the end of the block."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "STATE_DIRECTORY": str(folder / "state")}
    with (folder / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(bin_folder / command[0]), *command[1:]], env=clean, cwd=folder, stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_a_request_becomes_usage_of_a_customer_with_nothing_but_the_wheel(
    bin_folder: Path, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    request = serialized("authenticated")
    consumer: dict[str, Any] = request.parsed["consumer"]
    kong_yml = {
        "_format_version": "3.0",
        "consumers": [{"id": consumer["id"], "username": consumer["username"]}],
    }
    (tmp_path / "kong.yml").write_text(yaml.safe_dump(kong_yml))
    settings = {"sources": [{"type": "declarative-file", "path": "kong.yml"}], "metering": {"url": url}}
    (tmp_path / "syncd.yaml").write_text(yaml.safe_dump(settings))

    async def log_one_request() -> None:
        worker = KongWorker(tmp_path / "socket")
        plugin = PluginInstance(
            {"ingest_endpoint": f"{url}/api/v1/events", "queue": {"max_coalescing_delay": 0}}
        )
        assert await worker.log(plugin, request)
        await worker.close()

    sandbox = ("syncd", "sandbox", "--port", url.rpartition(":")[2], "--db", "sandbox.sqlite3")
    server = ("openmeter-plugin", "serve", "--socket", str(tmp_path / "socket"), "--spool", "spool")
    with running(bin_folder, tmp_path, *sandbox), running(bin_folder, tmp_path, *server):
        eventually(lambda: answers(f"{url}/healthz"), what="the sandbox")
        eventually((tmp_path / "socket").exists, what="the plugin server")
        asyncio.run(log_one_request())
        variables = {"SYNCD_CONFIG": str(tmp_path / "syncd.yaml"), "STATE_DIRECTORY": str(tmp_path / "state")}
        applied = run(bin_folder, "syncd", "apply", "--yes", **variables)
        assert applied.returncode == 0, applied.stderr

        def billed() -> bool:
            usage = json.loads(run(bin_folder, "syncd", "usage", "--output=json", **variables).stdout)
            found = [(customer["name"], customer["requests"]) for customer in usage["customers"]]
            return found == [(consumer["username"], 1)]

        eventually(billed, seconds=30, what="the bill")


def test_the_interpreter_is_the_clean_one(bin_folder: Path) -> None:
    program = "import sys; print(sys.prefix); import hypothesis"
    done = run(bin_folder, "python", "-c", program)
    assert done.stdout.strip() == str(bin_folder.parent)
    assert sys.prefix != str(bin_folder.parent)
    assert "No module named 'hypothesis'" in done.stderr
