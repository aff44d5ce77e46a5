"""The metering API's paths, fields and dialects are known to its clients only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import syncd
from syncd.config.settings import Dialect
from syncd.metering.dialects import DIALECTS

ROOT = Path(syncd.__file__).parent
KNOWING = ("metering", "sandbox")
"""Rooms that speak the API: its clients, and the server that tests and demos use."""
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in KNOWING)

PATHS = ("/api/v1", "/api/v3", "/openmeter")
NAME = re.compile(
    r"[a-z]+(?:[A-Z][a-z]*)+"  # usageAttribution
    r"|[a-z_]+(?:\[[a-z_]+\])+"  # filter[key][eq]
    r"|/?[a-z]+(?:-[a-z]+)+"  # /entitlement-access
    r"|/[a-z]+"  # /subscriptions
)
"""What only a path, a parameter or a field looks like; words without a capital may be Python's own."""
SPELLED_AS_IN_PYTHON = frozenset(
    {
        "usage_attribution",
        "deleted_at",
        "primary_email",
        "group_by_dimensions",
        "value_property",
        "events_from",
        "entitlement-access",
    }
)
SHARED = {
    "dashboard/health.py": {"page[size]", "page[number]"},  # Konnect's own lists have the same parameters
    "sources/konnect.py": {"page[size]", "page[number]"},
    "core/ownership.py": {"customerId"},  # metadata that the server writes, by which it is recognised
}
CONFIGURED = {"config/settings.py"}
"""The URL in the configuration may end with a dialect's prefix."""


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module, parts of f-strings included, without its docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@cache
def words_of_the_clients() -> frozenset[str]:
    """The paths, parameters and fields that the clients of all dialects spell out."""
    clients = sorted((Path(syncd.__file__).parent / "metering").glob("v*.py"))
    spelled = {text for path in clients for _, text in strings(path) if NAME.fullmatch(text)}
    return frozenset(spelled | SPELLED_AS_IN_PYTHON)


def spoken(path: Path) -> list[str]:
    """What a module knows of the API: paths, names of fields, comparisons of a dialect."""
    where = path.relative_to(ROOT).as_posix()
    own = words_of_the_clients() - SHARED.get(where, set())
    found = [
        f"{where}:{line}: {text!r}"
        for line, text in strings(path)
        if text in own or (text.startswith(PATHS) and where not in CONFIGURED)
    ]
    for node in ast.walk(ast.parse(path.read_text())):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject]
        branches = any("dialect" in ast.unparse(side) or "openmeter-v" in ast.unparse(side) for side in sides)
        if branches and where not in CONFIGURED:
            found.append(f"{where}:{node.lineno}: branches by dialect")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_room_knows_a_path_a_field_or_a_dialect_of_the_metering_api(path: Path) -> None:
    assert spoken(path) == []


def test_a_module_that_speaks_the_api_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "speaker.py"
    module.write_text(
        '"""Of /api/v1/customers."""\n'
        'def page(i, config):\n    """Of /openmeter/customers."""\n'
        '    if config.metering.dialect != "other":\n        return f"/api/v1/customers/{i}"\n'
        '    return {"usageAttribution": i}\n'
        'def access(client, i):\n    return client.get(f"{i}/entitlement-access", {"orderBy": 1})\n'
    )
    assert sorted(line.split(":")[1] for line in spoken(module)) == ["4", "5", "6", "8", "8"]


@pytest.mark.parametrize(
    "word", ["usageAttribution", "filterCustomerId", "orderBy", "filter[key][eq]", "/entitlement-access"]
)
def test_the_words_to_look_for_are_those_that_the_clients_use(word: str) -> None:
    assert word in words_of_the_clients()


def test_every_configured_dialect_has_its_client_in_the_table() -> None:
    assert DIALECTS.keys() == set(get_args(Dialect))
