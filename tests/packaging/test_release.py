"""A tag is released only if everything names its version, and the workflow does what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin import __version__
from tests.deploy.tools import needs, tool
from tests.packaging.distributions import ROOT
from tests.packaging.release import faults, sections

WORKFLOWS = ROOT / ".github" / "workflows"
TAG = f"v{__version__}"
CHART = "docs/examples/helm/kong-openmeter/Chart.yaml"


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A copy of the files that name the version, with a date in the changelog."""
    for path in ("plugin/Dockerfile", "syncd/Dockerfile", CHART):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    date = datetime.now(UTC).date().isoformat()
    text = (ROOT / "CHANGELOG.md").read_text()
    text = re.sub(rf"(## \[{re.escape(__version__)}\] - ).*", rf"\g<1>{date}", text)
    head = re.search(r"## \[Unreleased\]\n", text)
    assert head is not None
    following = text.index("## [", head.end())
    (tmp_path / "CHANGELOG.md").write_text(f"{text[: head.end()]}\n{text[following:]}")
    return tmp_path


def test_a_tag_whose_files_agree_can_be_released(ready: Path) -> None:
    assert faults(TAG, ready) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "named"),
    [
        (
            "docs/examples/helm/kong-openmeter/Chart.yaml",
            f"version: {__version__}",
            "version: 9.9.9",
            "version",
        ),
        ("plugin/Dockerfile", f'version="{__version__}"', 'version="9.9.9"', "plugin/Dockerfile"),
        ("CHANGELOG.md", f"## [{__version__}]", "## [9.9.9]", "no section"),
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- A line.\n", "[Unreleased]"),
    ],
    ids=["chart", "image", "no section", "unreleased lines"],
)
def test_what_disagrees_is_named(ready: Path, path: str, old: str, new: str, named: str) -> None:
    text = (ready / path).read_text()
    assert old in text
    (ready / path).write_text(text.replace(old, new, 1))
    assert any(named in fault for fault in faults(TAG, ready))


def test_another_tag_is_refused(ready: Path) -> None:
    assert any("the tag is v9.9.9" in fault for fault in faults("v9.9.9", ready))


def test_a_section_without_a_date_is_refused(ready: Path) -> None:
    text = re.sub(r"(## \[[\d.]+\] - ).*", r"\1unreleased", (ready / "CHANGELOG.md").read_text())
    (ready / "CHANGELOG.md").write_text(text)
    assert any("has no date" in fault for fault in faults(TAG, ready))


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    text = (
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2027-01-02\n\n- B\n\n## [0.1.0] - 2026-12-01\n\n- A\n"
    )
    assert sections(text) == {
        "Unreleased": ("", ""),
        "0.2.0": ("2027-01-02", "- B"),
        "0.1.0": ("2026-12-01", "- A"),
    }


# The workflow


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((WORKFLOWS / "release.yml").read_text())["jobs"]
    return found


@needs("actionlint")
def test_actionlint_finds_no_fault_in_the_workflows() -> None:
    command = [str(tool("actionlint")), *(str(path) for path in WORKFLOWS.glob("*.yml"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_is_published_before_the_tests_and_the_checks_have_passed() -> None:
    found = jobs()
    assert found["test"]["uses"] == "./.github/workflows/ci.yml"
    order = ["test", "packages", "images", "pypi", "release"]
    assert [found[after]["needs"] for after in order[1:]] == order[:-1]
    commands = [step.get("run", "") for step in found["packages"]["steps"]]
    (check,) = (number for number, text in enumerate(commands) if "tests.packaging.release check" in text)
    assert check < commands.index("make dist")


def test_each_job_may_do_what_it_needs_and_every_action_is_pinned() -> None:
    writes = {
        name: {scope for scope, what in job["permissions"].items() if what == "write"}
        for name, job in jobs().items()
    }
    assert writes == {
        "test": set(),
        "packages": set(),
        "images": {"packages", "id-token", "attestations"},
        "pypi": {"id-token"},
        "release": {"contents", "packages", "id-token", "attestations"},
    }
    for job in jobs().values():
        for step in job.get("steps", ()):
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            # What GitHub puts into a text is read as code there; a variable of the environment is not.
            assert "${{" not in step.get("run", "")


def test_every_image_and_the_chart_are_released() -> None:
    assert jobs()["images"]["strategy"]["matrix"]["image"] == [
        path.parent.name for path in sorted(ROOT.glob("*/Dockerfile"))
    ]
    commands = "\n".join(step.get("run", "") for job in jobs().values() for step in job.get("steps", ()))
    (chart,) = re.findall(r"helm package (\S+)", commands)
    assert (ROOT / chart / "Chart.yaml").is_file()
