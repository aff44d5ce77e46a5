"""Two syncds without a shared lock, on one metering API: no duplicates, nothing lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.syncd.processes import Project, command

pytestmark = pytest.mark.slow

SETTINGS = """
sources: [{{type: declarative-file, path: kong.yml}}]
metering: {{dialect: {dialect}, url: "{url}", attempts: 2}}
mapping: {{group_by: tag}}
guards: {{max_update_percent: 100}}  # the second may find many customers to change
"""
KONG = "_format_version: '3.0'\nconsumers:\n" + "".join(
    f"- {{id: c{number}, username: user-{number}, tags: ['customer:group-{number % 3}']}}\n"
    if number % 2
    else f"- {{id: c{number}, username: user-{number}}}\n"
    for number in range(40)
)


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_two_concurrent_applies_reach_one_state(tmp_path: Path, sandbox: httpx.Client, dialect: str) -> None:
    machines: list[Project] = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        project = Project(tmp_path / name, str(sandbox.base_url))
        (project.folder / "kong.yml").write_text(KONG)
        project.config.write_text(SETTINGS.format(dialect=dialect, url=str(sandbox.base_url)))
        machines.append(project)
    started = [
        subprocess.Popen(
            command("apply", "--yes"),
            cwd=machine.folder,
            env=machine.environment(),
            stdout=subprocess.DEVNULL,
        )
        for machine in machines
    ]
    # 3: changes that the other process made first may be blocked; the next run plans them again.
    assert {process.wait(timeout=60) for process in started} <= {0, 3}
    assert machines[0].call("apply", "--yes").returncode == 0
    assert machines[1].call("plan").returncode == 0
    items = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    carried = [key for customer in items for key in customer["usageAttribution"]["subjectKeys"]]
    assert sorted(carried) == sorted(f"consumer:c{number}" for number in range(40))
    assert len({customer["key"] for customer in items}) == len(items) == 23
