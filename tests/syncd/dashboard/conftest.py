"""One sandbox per test file, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project


@pytest.fixture(scope="module")
def sandbox_url() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


@pytest.fixture
def sandbox(sandbox_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sandbox_url, timeout=20) as client:
        client.post("/sandbox/v1/reset").raise_for_status()
        yield client


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    return Project(tmp_path, str(sandbox.base_url))
