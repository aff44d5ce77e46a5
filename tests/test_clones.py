"""The clone that the documentation's commands run in is one, and nothing in it comes from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import checkout
from tests.clones import Clone, shared_packages

pytestmark = pytest.mark.slow

PROGRAMS = (
    ".venv/bin/syncd --version",
    "syncd --version",
    "openmeter-plugin info",
    ".venv/bin/python -m tests.demo -h",
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.make(tmp_path_factory.mktemp("clones") / "kong-openmeter")


def test_the_packages_of_the_project_are_the_clones(clone: Clone) -> None:
    program = (
        "import openmeter_plugin as a, syncd as b, tests as c; print(a.__file__, b.__file__, c.__file__)"
    )
    found = clone.run([f".venv/bin/python -c '{program}'"]).split()
    parts = ("plugin/openmeter_plugin", "syncd", "tests")
    assert found == [str(clone.folder / part / "__init__.py") for part in parts]


def test_the_checkout_is_not_even_looked_at(clone: Clone) -> None:
    places = clone.run([".venv/bin/python -c 'import sys; print(*sys.path, sys.prefix)'"]).split()
    assert str(clone.folder / ".venv") in places
    ours = {str(path) for path in (checkout.ROOT, *checkout.ROOT.rglob("*")) if path.is_dir()}
    assert (ours & set(places)) <= set(shared_packages())


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_program_runs_the_clones_code(command: str, clone: Clone) -> None:
    said = clone.run([f"{command} 2>&1"], PYTHONVERBOSE="1")
    files = set(re.findall(r"[ '](/\S+/(?:openmeter_plugin|syncd|tests)/\S+?\.pyc?)\b", said))
    assert files
    assert [file for file in files if not Path(file).is_relative_to(clone.folder)] == []


@pytest.mark.skipif(not checkout.is_repository(), reason="this is no repository")
def test_it_has_the_history_and_no_file_that_git_ignores(clone: Clone) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=clone.folder, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert re.fullmatch(r"[0-9a-f]{40,}\n", git("rev-parse", "HEAD"))
    ignored = [line for line in git("status", "--porcelain", "--ignored").splitlines() if line[:2] == "!!"]
    assert [line for line in ignored if not line.endswith((" .venv/", "__pycache__/"))] == []


# Changes that are not committed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another repository, with one commit and changes of every kind since."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "project"
    (folder / "docs").mkdir(parents=True)
    for name in ("kept", "changed", "deleted", "staged", "docs/moved"):
        (folder / name).write_text("old")
    (folder / ".gitignore").write_text("*.log\n__pycache__/\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]

    def git(*arguments: str) -> None:
        nobodys = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *identity, *arguments]
        subprocess.run(command, cwd=folder, env=nobodys, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    (folder / "changed").write_text("new")
    (folder / "staged").write_text("new")
    git("add", "staged")
    (folder / "deleted").unlink()
    git("mv", "docs/moved", "docs/here")
    (folder / "new folder").mkdir()
    (folder / "new folder" / "n\u00e9w").write_text("new")
    (folder / "ignored.log").write_text("new")
    monkeypatch.setattr(checkout, "ROOT", folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in found.items() if not name.startswith(".git/")}


NOW = {"kept": "old", "changed": "new", "staged": "new", "docs/here": "old", "new folder/n\u00e9w": "new"}


def test_a_clone_has_what_is_committed(project: Path, tmp_path: Path) -> None:
    checkout.clone(tmp_path / "clone")
    names = ("kept", "changed", "deleted", "staged", "docs/moved")
    assert files(tmp_path / "clone") == {
        **dict.fromkeys(names, "old"),
        ".gitignore": "*.log\n__pycache__/\n",
    }


def test_changes_are_laid_over_it(project: Path, tmp_path: Path) -> None:
    checkout.clone(tmp_path / "clone")
    checkout.lay_changes_over(tmp_path / "clone")
    assert files(tmp_path / "clone") == {**NOW, ".gitignore": "*.log\n__pycache__/\n"}


def test_where_there_is_no_repository_the_files_are_copied(project: Path, tmp_path: Path) -> None:
    assert checkout.is_repository()
    (project / ".git").rename(tmp_path / "git")
    assert not checkout.is_repository()
    checkout.copy(tmp_path / "copy")
    assert files(tmp_path / "copy") == {**NOW, ".gitignore": "*.log\n__pycache__/\n"}


def test_a_repository_that_cannot_be_cloned_is_told(project: Path, tmp_path: Path) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "file").touch()
    with pytest.raises(RuntimeError, match="already exists"):
        checkout.clone(tmp_path / "clone")
