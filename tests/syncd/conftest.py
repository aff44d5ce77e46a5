"""What most tests of syncd start from: an empty metering API, and a folder with a configuration for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from syncd.config.settings import Dialect
from syncd.sandbox.testing import running_sandbox
from syncd.state.location import StateLocation
from tests.harness.postgres import Postgres, programs, running_postgres
from tests.syncd.processes import Project


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a sandbox that the tests of a module share."""
    with running_sandbox() as url:
        yield url


@pytest.fixture
def sandbox(server: str) -> Iterator[httpx.Client]:
    """That sandbox, empty."""
    with httpx.Client(base_url=server, timeout=20) as client:
        client.post("/sandbox/v1/reset").raise_for_status()
        yield client


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that the tests of a process share."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (on Debian: apt-get install postgresql)")
    with running_postgres(folder) as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> StateLocation:
    """A place for the state, in each database in turn."""
    if request.param == "sqlite":
        return StateLocation(tmp_path / "state")
    return StateLocation(tmp_path / "state", request.getfixturevalue("postgres").new_database())


@pytest.fixture(params=["openmeter-v1", "openmeter-v3"])
def dialect(request: pytest.FixtureRequest) -> Dialect:
    """Each dialect in turn."""
    return "openmeter-v3" if request.param == "openmeter-v3" else "openmeter-v1"


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    """A folder with a declarative file of Kong and a configuration for the sandbox."""
    return Project(tmp_path, str(sandbox.base_url))
