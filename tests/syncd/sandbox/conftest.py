"""Real HTTP over a real socket and a real SQLite file: one sandbox for all tests, emptied before each."""

from collections.abc import Iterator

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox


@pytest.fixture(scope="session")
def shared_api() -> Iterator[httpx.Client]:
    with running_sandbox() as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def api(shared_api: httpx.Client) -> httpx.Client:
    assert shared_api.post("/sandbox/v1/reset").status_code == 204
    return shared_api
