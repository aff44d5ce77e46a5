"""What the repository's host and editors read: valid, and in agreement with what the project itself says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import Any, Final

import pytest
import yaml

from tests.documents import ROOT

GITHUB: Final = ROOT / ".github"
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> dict[str, Any]:
    # As YAML 1.2 has it, and GitHub: `on` is a word, not true.
    found: dict[str, Any] = yaml.load((ROOT / name).read_text(), Loader=yaml.BaseLoader)
    return found


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", "workflows/*.yml"),
        ("dependabot", "dependabot.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/*_*.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_what_the_host_reads_is_valid(schema: str, files: str) -> None:
    paths = [str(path) for path in GITHUB.glob(files)]
    assert paths
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_ci_runs_the_projects_own_command_on_every_python_that_it_claims() -> None:
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == claimed


def test_ci_may_read_the_repository_and_nothing_else() -> None:
    workflow = read(".github/workflows/ci.yml")
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []


def test_dependabot_looks_where_versions_stand() -> None:
    for update in read(".github/dependabot.yml")["updates"]:
        folders = update.get("directories", [update.get("directory")])
        for folder in folders:
            assert (ROOT / folder.lstrip("/")).is_dir(), folder
        if update["package-ecosystem"] == "docker":
            images = {f"/{path.parent.relative_to(ROOT)}" for path in ROOT.glob("*/Dockerfile")}
            assert set(folders) == images


def test_the_hooks_before_a_commit_are_programs_of_the_environment() -> None:
    (local,) = read(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].split() for hook in local["hooks"]]
    assert {" ".join(words[:2]).removeprefix(".venv/bin/") for words in entries} >= {
        "ruff check",
        "ruff format",
        "mypy",
        "lint-imports",
    }
    asked_for = " ".join(PROJECT["optional-dependencies"]["dev"])
    for program, *_ in entries:
        name = program.removeprefix(".venv/bin/").replace("lint-imports", "import-linter")
        assert f"{name}>=" in asked_for


def test_lines_are_as_long_for_editors_as_for_ruff() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert (
        f"[*.py]\nindent_size = 4\nmax_line_length = {ruff['line-length']}\n"
        in (ROOT / ".editorconfig").read_text()
    )
