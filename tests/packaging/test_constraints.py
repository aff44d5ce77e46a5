""".ci/constraints.txt pins everything that the project, its tests and its build ask for."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

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


def imported(module: Path) -> set[str]:
    """The packages that a module imports, at its top or when a function runs."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("package", "extras"),
    [("plugin/openmeter_plugin", ()), ("syncd", ("syncd", "notify", "postgres"))],
    ids=["plugin", "syncd"],
)
def test_a_package_imports_only_what_it_is_installed_with(package: str, extras: tuple[str, ...]) -> None:
    groups = PROJECT["project"]["optional-dependencies"]
    there = needed(PROJECT["project"]["dependencies"] + [one for extra in extras for one in groups[extra]])
    homes = packages_distributions()
    foreign: dict[str, set[str]] = {}
    for module in (ROOT / package).rglob("*.py"):
        if module.name == "kong_pdk.py":  # has an extra of its own
            continue
        for name in imported(module) - set(sys.stdlib_module_names) - {"openmeter_plugin", "syncd"}:
            foreign.setdefault(name, set()).add(str(module.relative_to(ROOT)))
    assert foreign
    missing = {
        name: modules
        for name, modules in foreign.items()
        if not {canonicalize_name(home) for home in homes[name]} & there.keys()
    }
    assert missing == {}
