"""The path of one consumer through the modules, as docs/development.md counts them."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

import syncd
from tests.documents import ROOT
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

PACKAGE = Path(syncd.__file__).parent


def imports(frame: FrameType | None) -> bool:
    """Whether a function runs only because a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def test_the_map_counts_the_modules_that_one_consumer_passes(tmp_path: Path, server: str) -> None:
    people = [{"id": "1", "username": "alice", "tags": ["customer:acme"]}]

    def kong(asked: Asked) -> Answer:
        return Answer({"data": people if asked.path == "/consumers" else [], "next": None})

    passed: set[Path] = set()

    def hook(frame: FrameType, event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path not in passed and not imports(frame):
            passed.add(path)

    with serving(kong) as admin:
        project = Project(tmp_path, server, f"sources: [{{type: kong-admin, url: '{admin.url}'}}]\n")
        assert project.call("apply", "--yes").returncode == 0
        people.append({"id": "2", "username": "bob", "tags": ["customer:acme"]})
        before = sys.getprofile()
        threading.setprofile(hook)
        sys.setprofile(hook)
        try:
            assert "~ customer acme: add bob" in project.call("apply", "--yes").stdout
        finally:
            sys.setprofile(before)
            threading.setprofile(None)
    modules = {path for path in passed if path.name != "__init__.py" and "sandbox" not in path.parts}
    claimed = re.search(r"at most (\d+) modules of syncd", (ROOT / "docs" / "development.md").read_text())
    assert claimed
    assert int(claimed[1]) - 5 <= len(modules) <= int(claimed[1]), sorted(map(str, modules))
