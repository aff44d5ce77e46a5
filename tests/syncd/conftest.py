"""What most tests of syncd start from: an empty metering API, and a folder with a configuration for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from syncd.config.settings import Dialect
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a sandbox that the tests of a module share."""
    with running_sandbox() as url:
        yield url


@pytest.fixture
def sandbox(server: str) -> Iterator[httpx.Client]:
    """That sandbox, empty."""
    with httpx.Client(base_url=server) as client:
        client.post("/sandbox/v1/reset").raise_for_status()
        yield client


@pytest.fixture(params=["openmeter-v1", "openmeter-v3"])
def dialect(request: pytest.FixtureRequest) -> Dialect:
    """Each dialect in turn."""
    return "openmeter-v3" if request.param == "openmeter-v3" else "openmeter-v1"


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    """A folder with a declarative file of Kong and a configuration for the sandbox."""
    return Project(tmp_path, str(sandbox.base_url))
