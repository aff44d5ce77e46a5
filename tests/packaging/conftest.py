"""Built once for all tests of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.distributions import ROOT, build, environment


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel and source distribution by kind."""
    return build(ROOT, tmp_path_factory.mktemp("dist"), "wheel", "sdist")


@pytest.fixture(scope="session")
def bin_folder(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has nothing but the wheel and what it asks for, extras included."""
    return environment(tmp_path_factory.mktemp("clean") / "venv", built["wheel"], "all")


@pytest.fixture(scope="session")
def plugin_only(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has the wheel without extras."""
    return environment(tmp_path_factory.mktemp("plugin") / "venv", built["wheel"])
