"""The path of one event through the modules, as docs/development.md counts them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import openmeter_plugin
from openmeter_plugin.books.equations import total
from tests.bench.beside import hand_over
from tests.bench.driver import ProtoBuf, connect
from tests.bench.processes import sink
from tests.documents import ROOT
from tests.harness.books import read_counts
from tests.harness.process import eventually, plugin_server

pytestmark = pytest.mark.slow

PACKAGE = Path(openmeter_plugin.__file__).parent

HOOK = """
import os, sys, threading
folder, package, passed = os.environ["PASSED"], os.environ["PACKAGE"], set()
def hook(frame, event, argument):
    path = frame.f_code.co_filename
    if event != "call" or path in passed or not path.startswith(package):
        return
    if not os.path.exists(folder + "/on"):
        return
    while frame is not None:  # a function that runs only because a module is imported
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return
        frame = frame.f_back
    passed.add(path)
    with open(folder + "/passed", "a") as file:
        file.write(path + "\\n")
threading.setprofile(hook)
sys.setprofile(hook)
"""
"""Runs in each process of the plugin server, and in each of their threads."""


def passed_by_one_event(tmp_path: Path) -> set[Path]:
    """Return the modules of which a function runs while one event is on its way, in any process."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {
        "PYTHONPATH": f"{tmp_path / 'hook'}:{PACKAGE.parent}",
        "PASSED": str(tmp_path),
        "PACKAGE": f"{PACKAGE}/",
    }
    with sink() as endpoint, plugin_server(tmp_path, environment=environment) as server:
        config: dict[str, Any] = {"ingest_endpoint": endpoint.endpoint, "__plugin_id": "path"}
        protocol = ProtoBuf()
        with connect(server.socket) as connection:
            protocol.start(connection, config)
            hand_over(connection, protocol, 1)
            eventually(lambda: endpoint.received() == 1, what="the first delivery")
            (tmp_path / "on").touch()
            hand_over(connection, protocol, 2)
            eventually(lambda: endpoint.received() == 2, what="the delivery")
            eventually(lambda: _delivered(server.spool) == 2, what="the commit")
            (tmp_path / "on").unlink()
    return {Path(line).relative_to(PACKAGE) for line in (tmp_path / "passed").read_text().splitlines()}


def _delivered(spool: Path) -> int:
    return sum(total(counts, "delivered") for counts in read_counts(spool).values())


def test_the_map_counts_the_modules_that_one_event_passes(tmp_path: Path) -> None:
    modules = passed_by_one_event(tmp_path)
    page = (ROOT / "docs" / "development.md").read_text()
    claimed = re.search(r"at most (\d+) modules of the plugin", page)
    assert claimed
    assert int(claimed[1]) - 8 <= len(modules) <= int(claimed[1]), sorted(map(str, modules))
