"""docs/scale.md is what its model says, and the model counts what runs do."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from openmeter_plugin.config.schema import FIELDS
from syncd.apply import executor
from syncd.config.settings import Config
from syncd.http import pagination
from syncd.sandbox.testing import running_sandbox
from tests import scale
from tests.documents import ROOT
from tests.syncd.processes import Project

PAGE = scale.PAGE.read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
DIALECTS = ["openmeter-v1", "openmeter-v3"]


def test_the_tables_are_up_to_date() -> None:
    assert scale.written(PAGE) == PAGE, "run python -m tests.scale"
    assert sorted(re.findall(r"<!-- scale: (\S+) -->", PAGE)) == ["delivery", "sync"]


def test_the_inputs_of_the_model_are_the_defaults_of_the_code() -> None:
    queue = next(field["queue"] for field in FIELDS if "queue" in field)
    defaults = {name: described.get("default") for one in queue["fields"] for name, described in one.items()}
    assert defaults["max_batch_size"] == scale.BATCH_EVENTS
    assert defaults["max_coalescing_delay"] == scale.BATCH_SECONDS
    assert pagination._PAGE_SIZES[0] == scale.LIST_PAGE
    assert executor._SUBJECTS_AT_ONCE == scale.SUBJECTS_AT_ONCE
    config = Config.model_validate(
        {"metering": {"url": "http://m"}, "sources": [{"type": "static", "subjects": []}]}
    )
    assert config.metering.concurrency == scale.CONCURRENCY


@pytest.mark.parametrize(
    ("shown", "used"),
    [
        (r"5 GiB waiting \((\S+) million events", 5 * 2**30 / scale.EVENT_BYTES / 1_000_000),
        (r"first sync of 20,000 consumers.*?\| ([\d,]+) creates/s", scale.CREATES_PER_SECOND),
        (r"100,000 consumers in sync: read both sides and plan \| (\S+) s", scale.PLAN_SECONDS * 100_000),
        (r"`syncd plan` of 100,000 consumers uses at most (\S+) MiB", scale.memory_mib(100_000)),
    ],
)
def test_the_measured_inputs_are_those_of_the_benchmarks(shown: str, used: float) -> None:
    found = re.search(shown, BENCHMARKS)
    assert found
    assert float(found[1].replace(",", "")) == pytest.approx(used)


@pytest.fixture
def server() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("consumers", [50, 250])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_first_sync_and_a_later_run_make_as_many_requests_as_the_model_says(
    tmp_path: Path, server: str, dialect: str, consumers: int
) -> None:
    listed = "".join(
        f"- {{id: '{uuid.UUID(int=number)}', username: u{number}}}\n" for number in range(consumers)
    )
    project = Project(tmp_path, server, "sources: [{type: declarative-file, path: kong.yml}]\n")
    project.configure(f"metering: {{url: '{server}', dialect: {dialect}}}\n")
    (project.folder / "kong.yml").write_text(f"_format_version: '3.0'\nconsumers:\n{listed}")
    has_subjects = dialect == "openmeter-v1"

    def asked() -> dict[str, int]:
        found = httpx.get(f"{server}/sandbox/v1/stats").json()["requests_by_endpoint"]
        return {name: count for name, count in found.items() if "/sandbox/" not in name}

    def made(before: dict[str, int], *, writes: bool) -> int:
        names = ("customers", "subjects") if writes else ("customers", "subjects", "query")
        return sum(
            count - before.get(name, 0)
            for name, count in asked().items()
            if name.endswith(names) and (name.startswith("POST") and not name.endswith("query")) == writes
        )

    before = asked()
    assert project.call("apply", "--yes").returncode == 0
    assert made(before, writes=True) == scale.write_requests(consumers, has_subjects=has_subjects)
    before = asked()
    assert project.call("apply", "--yes").returncode == 0
    assert made(before, writes=True) == 0
    assert made(before, writes=False) == scale.read_requests(consumers, has_subjects=has_subjects)
