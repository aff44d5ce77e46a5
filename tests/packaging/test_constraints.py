""".ci/constraints.txt pins everything that the project, its tests and its build ask for."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import pytest
from packaging.utils import canonicalize_name

from tests.packaging.distributions import NAME, PROJECT, ROOT, needed

LINES = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
PINS: dict[str, str] = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES}


HAS_DOCS = find_spec("mkdocs") is not None
"""Whether the group `docs` is installed: `make docs` and `make test` do it, `make setup` does not."""


def everything() -> dict[str, str]:
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    groups = project["optional-dependencies"]
    left_out = {"dist"} if HAS_DOCS else {"dist", "docs"}
    requirements += [text for name, group in groups.items() if name not in left_out for text in group]
    return {name: found.version for name, found in needed(requirements).items() if name != NAME}


def test_every_line_is_one_exact_version() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert len(PINS) == len(LINES)


def test_everything_that_is_asked_for_is_pinned_and_installed_as_pinned() -> None:
    asked_for = everything()
    assert {name: PINS.get(name) for name in asked_for} == asked_for


@pytest.mark.skipif(not HAS_DOCS, reason="the group docs is not installed: make docs")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python ask for less or more")
def test_nothing_is_pinned_that_nobody_asks_for() -> None:
    assert sorted(set(PINS) - set(everything())) == []


def test_images_are_built_by_the_pins_and_so_is_the_environment_of_the_tests() -> None:
    for path in ("plugin/Dockerfile", "syncd/Dockerfile", "Makefile"):
        said = (ROOT / path).read_text()
        assert "--constraint .ci/constraints.txt" in said
        # And the build backend, which pip gets by itself.
        assert re.search(r"PIP_CONSTRAINT=\S+/.ci/constraints.txt", said)
        assert re.search(r"PIP_BUILD_CONSTRAINT=\S+/.ci/constraints.txt", said)
