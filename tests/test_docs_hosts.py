"""What the documentation has an operator type on hosts: run with the host's folders elsewhere.

Nothing is installed from the network: `pip install` builds the project from the clone, and finds what that
asks for among the packages of the environment that runs the tests, in the versions of .ci/constraints.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest
import yaml

from openmeter_plugin.spool.destination import write_destination
from syncd.sandbox.testing import running_sandbox
from tests.clones import Clone, shared_packages
from tests.deploy.tools import needs, tool
from tests.documents import PAGES, blocks, commands
from tests.plugin.deliveries import record, spooled
from tests.plugin.events_server import EventsServer, serving, take_all
from tests.plugin.spools import destination
from tests.syncd.sandbox.support import create_customer, event, send

pytestmark = pytest.mark.slow

Prepared = Iterator[None]
WITHOUT_NETWORK: Final = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "false",
    "PIP_NO_CACHE_DIR": "1",
    "PYTHONPATH": ":".join(shared_packages()),
}
"""With these `pip install` takes what is there for what it would download."""
STAND_IN: Final = "#!/bin/bash\n{script}\n"
SYSTEMCTL: Final = """
echo "systemctl $*"
[ "$1 $2" = "enable --now" ] || exit 0
exec {systemctl} --root={host} enable "${{@:3}}"
"""
"""systemctl enables the units below the host's folder; without a running systemd it starts nothing."""
PYTHON3: Final = r"""
[ "$1 $2" = "-m venv" ] && mkdir --parents "$3/bin" || exit 3
echo '#!/bin/bash
[ "$1 $2" = "install --constraint" ] && [ -f "$3" ] && [ -f "${4%%\[*}/pyproject.toml" ]' >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    with tempfile.TemporaryDirectory(prefix="h") as host:
        for folder in ("opt", "run", "etc", "var/lib", "mnt"):
            (Path(host) / folder).mkdir(parents=True)
        yield Clone.make(tmp_path / "kong-openmeter", Path(host))


@contextmanager
def enable_the_plugin(clone: Clone) -> Prepared:
    """The folder for the socket; what is installed there afterwards is the clone's, of the same versions."""
    (clone.host / "run" / "openmeter").mkdir()
    yield
    (installed,) = (clone.host / "opt").glob("*/lib/python*/site-packages")
    assert (installed / "openmeter_plugin" / "cli" / "main.py").is_file()
    assert [path.name for path in installed.glob("*.pth") if "kong" in path.name] == []
    assert (clone.host / "var/lib/openmeter-plugin/spool").is_dir()
    assert list((clone.host / "run" / "openmeter").iterdir()) == [], "it was stopped and has tidied up"


@contextmanager
def http_log(clone: Clone) -> Prepared:
    """The configuration that the page shows before."""
    config = next(block.text for block in blocks("docs/http-log.md", "yaml") if "http_log:" in block.text)
    (clone.folder / "openmeter-plugin.yaml").touch(0o600)
    (clone.folder / "openmeter-plugin.yaml").write_text(config)
    yield
    assert (clone.host / "var/lib/openmeter-plugin/spool").is_dir()


@contextmanager
def lua_plugin(clone: Clone) -> Prepared:
    """The folder for the segments, and the package as it is installed for the plugin server."""
    (clone.host / "run/openmeter/segments").mkdir(parents=True)
    programs = clone.host / "opt/kong-openmeter/bin"
    programs.mkdir(parents=True)
    (programs / "openmeter-plugin").symlink_to(Path(sys.executable).with_name("openmeter-plugin"))
    yield
    assert (clone.host / "opt/kong-openmeter/lua/kong/plugins/openmeter/handler.lua").is_file()
    assert (clone.host / "run/openmeter/segments/instances").is_dir()


@contextmanager
def deployment(clone: Clone) -> Prepared:
    """A disk of a gateway that is gone, with an event that was not delivered."""
    spool = clone.host / "mnt/old/spool"
    (clone.folder / "metering-token").write_text("token-of-the-drain\n")
    with serving(EventsServer(take_all)) as server:
        write_destination(spool, destination(server.url))
        spooled(spool, [record(1)])
        yield
        assert set(server.taken) == {"event-000001"}
        assert server.posts[-1].headers["authorization"] == "Bearer token-of-the-drain"


@contextmanager
def gate(clone: Clone) -> Prepared:
    """The two files that the page describes; the customer it makes gets what the page grants."""
    (clone.host / "usr/local/lib").mkdir(parents=True)
    (clone.host / "run/openmeter").mkdir(parents=True)
    endpoint = clone.with_its_ports("http://127.0.0.1:8888/api/v1/events")
    (clone.folder / "openmeter-plugin.yaml").touch(0o600)
    (clone.folder / "openmeter-plugin.yaml").write_text(f"ingest_endpoint: {endpoint}\n")
    shown = next(block.text for block in blocks("docs/gate.md", "yaml") if "mode: enforce" in block.text)
    socket = clone.host / "run/openmeter/gate.sock"
    (clone.folder / "gate.yaml").write_text(clone.with_its_ports(shown) + f"socket: {socket}\n")
    yield
    written = clone.host / "usr/local/lib/kong-openmeter/kong/plugins/openmeter-gate/handler.lua"
    assert written.is_file()
    assert "/run/openmeter/gate.sock" in (clone.folder / "gate.lua").read_text()


@contextmanager
def migration(clone: Clone) -> Prepared:
    """Two metering APIs in which the same was used by customers of other ids, in another order."""
    with ExitStack() as stack:
        customers = ("acme", "bolt")
        for name, order in (("syncd.yaml", customers), ("shadow.yaml", reversed(customers))):
            url = stack.enter_context(running_sandbox())
            api = stack.enter_context(closing(httpx.Client(base_url=url)))
            for key in order:
                create_customer(api, key.title(), key=key, subjects=[f"user-of-{key}"])
                used = {"time": "2026-11-22T05:49:03.779Z", "subject": f"user-of-{key}"}
                assert send(api, event(f"{name}-{key}", **used)).is_success
            settings = {"sources": [{"type": "static", "subjects": []}], "metering": {"url": url}}
            (clone.folder / name).write_text(yaml.safe_dump(settings))
        yield
    rows = [row.split() for row in (clone.folder / "real.txt").read_text().splitlines()]
    assert ["user-of-acme", "1", "0"] in rows


PREPARED: Final[dict[str, Callable[[Clone], AbstractContextManager[None]]]] = {
    "docs/deployment.md": deployment,
    "docs/gate.md": gate,
    "docs/howto/enable-the-plugin.md": enable_the_plugin,
    "docs/http-log.md": http_log,
    "docs/lua-plugin.md": lua_plugin,
    "docs/migration.md": migration,
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, on_host=True)])
def test_what_is_typed_on_a_host_does_what_the_page_says(page: str, clone: Clone) -> None:
    with PREPARED[page](clone):
        clone.run(commands(page, on_host=True), on_host=True, **WITHOUT_NETWORK)


@pytest.mark.timeout(200)
@needs("systemctl")
def test_systemd_enables_what_the_page_has_you_install(clone: Clone) -> None:
    """A stand-in for pip installs nothing again."""
    for folder in ("systemd/system", "sysusers.d"):
        (clone.host / "etc" / folder).mkdir(parents=True)
    shutil.copy(clone.folder / "docs/examples/syncd.yaml", clone.folder / "syncd.yaml")
    programs = clone.host / "bin"
    programs.mkdir()
    scripts = {
        "systemctl": SYSTEMCTL.format(host=clone.host, systemctl=tool("systemctl")),
        "systemd-sysusers": "true",
        "python3": PYTHON3,
    }
    if shutil.which("openssl") is None:
        scripts["openssl"] = "echo 0123456789abcdef"
    for name, script in scripts.items():
        (programs / name).write_text(STAND_IN.format(script=script))
        (programs / name).chmod(0o755)
    pages = ("docs/quickstart-systemd.md", "docs/deployment.md")  # installing, then upgrading
    shown = [block for page in pages for block in blocks(page, "sh")]
    of_systemd = [b for b in shown if b.reason == "needs root and systemd" and "spool status" not in b.text]
    group = subprocess.run(["id", "-gn"], capture_output=True, text=True, check=True).stdout.strip()
    lines = [line.replace("--group syncd", f"--group {group}") for b in of_systemd for line in b.lines]
    path = f"{programs}:{clone.environment['PATH']}"
    told = clone.run(lines, on_host=True, PATH=path, METERING_TOKEN="t0ken")
    assert told.splitlines().count("systemctl daemon-reload") == 3
    etc = clone.host / "etc"
    enabled = {path.name for path in (etc / "systemd" / "system").glob("*.wants/*")}
    assert enabled >= {"openmeter-plugin.socket", "syncd.service"}
    assert (etc / "syncd" / "environment").read_text() == "SYNCD_METERING__TOKEN=t0ken\n"
    modes = {
        path: (etc / path).stat().st_mode & 0o777
        for path in ("syncd/environment", "kong-openmeter/plugin-api-token")
    }
    assert set(modes.values()) == {0o600}
    assert (clone.host / "opt/kong-openmeter").resolve().name == "kong-openmeter-0.2.0"
