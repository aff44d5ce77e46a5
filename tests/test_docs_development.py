"""The map for contributors, docs/development.md: its rooms, files and functions are those of the code."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.documents import PAGES, ROOT, blocks

MAP: Final = ROOT / "docs" / "development.md"
FOR_CONTRIBUTORS: Final = [
    page
    for page in PAGES
    if page in {"CONTRIBUTING.md", "docs/development.md"} or page.startswith("docs/decisions/")
]
CONTRACTS: Final = {
    contract["containers"][0]: contract["layers"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
}


# Rooms


def drawn(diagram: str) -> list[set[str]]:
    """Return the layers of a diagram, top to bottom; each line of arrows begins where the last one ended.

    An invisible link (`~~~`) puts a room beside the one that the line above it leads to.
    """
    layers: list[set[str]] = []
    diagram = re.sub(r"(?m)^(  (\S+) --> .*)\n  \2 ~~~ (.*)$", r"\1 & \3", diagram)
    for upper, lower in re.findall(r"^  (\S.*) --> (.*)$", diagram, re.MULTILINE):
        here, below = set(upper.split(" & ")), set(lower.split(" & "))
        assert not layers or layers[-1] == here, upper
        layers = [*(layers or [here]), below]
    return layers


@pytest.mark.parametrize(("number", "package"), [(0, "openmeter_plugin"), (1, "syncd")])
def test_a_diagram_shows_the_layers_that_imports_are_held_to(number: int, package: str) -> None:
    diagram = blocks("docs/development.md", "mermaid")[number].text
    assert drawn(diagram) == [set(layer.split(" | ")) for layer in CONTRACTS[package]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_diagram_labels_only_rooms_that_it_shows(number: int) -> None:
    diagram = blocks("docs/development.md", "mermaid")[number].text
    labelled = set(re.findall(r"^  (\w+)\[", diagram, re.MULTILINE))
    painted = set(re.search(r"^  class (\S+) pure$", diagram, re.MULTILINE)[1].split(","))  # type: ignore[index]
    assert labelled | painted <= set().union(*drawn(diagram))


# Files and functions


@cache
def definitions(path: Path) -> frozenset[str]:
    """Return the names that a module defines at its top and, after a dot, those in its classes."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found.add(name)
                inner = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                found |= {f"{name}.{n.name}" for n in inner}
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
    return frozenset(found)


def steps() -> list[str]:
    """Return each step of the two paths through the code, on one line."""
    start, end = "## The path of one event", "## To change X, open Y"
    text = MAP.read_text().partition(start)[2].partition(end)[0]
    parts = [" ".join(part.split()) for part in re.split(r"\n(?=\d+\. )|\n\n", text)]
    return [part for part in parts if "](../" in part]


@pytest.mark.parametrize("step", steps(), ids=lambda step: step[:60])
def test_a_step_names_functions_of_the_files_that_it_links(step: str) -> None:
    files = [MAP.parent / link for link in re.findall(r"\]\((\.\./[^)]+\.py)\)", step)]
    there: set[str] = set().union(*(definitions(file) for file in files))
    named = re.findall(r"`([A-Za-z_][\w.]*)`", step)
    assert named
    assert [name for name in named if name not in there] == []


def test_the_paths_have_steps_of_event_and_consumer() -> None:
    assert len(steps()) > 30
    assert {"plugin", "syncd"} == {re.search(r"\(\.\./(\w+)", step)[1] for step in steps()}  # type: ignore[index]


def rows() -> list[tuple[str, str]]:
    """Return what to change and which files to open."""
    text = MAP.read_text().partition("## To change X, open Y")[2].partition("## Tests")[0]
    return [(what, files) for what, files in re.findall(r"^\| (.+?) \| (\[.+) \|$", text, re.MULTILINE)]


def test_the_table_leads_to_files_from_thirty_intentions_and_more() -> None:
    assert len(rows()) > 60
    assert len({what for what, _ in rows()}) == len(rows())


@pytest.mark.parametrize(("what", "files"), rows(), ids=lambda part: part[:40])
def test_a_name_behind_a_file_of_the_table_is_in_that_file(what: str, files: str) -> None:
    wrong = []
    for link, note in re.findall(r"\]\(([^)]+)\) \(([^()]*)\)", files):
        code = (MAP.parent / link).read_text()
        named = re.findall(r"`([A-Za-z_][\w.]*)`", note)
        wrong += [name for name in named if not all(part in code for part in name.split("."))]
    assert wrong == [], what


def contents(page: str) -> str:
    return (ROOT / page).read_text()


def test_a_link_says_where_it_leads() -> None:
    wrong = [
        (page, label, target)
        for page in FOR_CONTRIBUTORS
        for label, target in re.findall(r"\[([\w\\./-]+/[\w\\./-]+)\]\(([^)#]+)\)", contents(page))
        if not re.sub(r"(index|README)\.md$", "", target).rstrip("/").endswith(label.rstrip("/"))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", FOR_CONTRIBUTORS)
def test_a_path_in_the_text_exists(page: str) -> None:
    named = set(re.findall(r"`((?:plugin|syncd|tests|docs|\.ci|\.github)/[\w./-]+)`", contents(page)))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


# What a room says of itself

ROOMS: Final = sorted(
    path.parent
    for package in (ROOT / "plugin" / "openmeter_plugin", ROOT / "syncd")
    for path in package.glob("*/__init__.py")
)
each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: f"{room.parent.name}.{room.name}")


def imported(room: Path) -> set[str]:
    """Return the rooms of the same package from which a room's modules import."""
    package = room.parent
    names: set[str] = set()
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    found = {name.split(".")[1] for name in names if name.startswith(f"{package.name}.")}
    return {name for name in found if name != room.name and (package / name / "__init__.py").exists()}


def said_of(room: Path) -> str:
    return " ".join((ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").split())


@each_room
def test_a_room_names_the_rooms_that_it_imports(room: Path) -> None:
    said = said_of(room).partition("May import: ")[2]
    if "every room" not in said:
        assert set(re.findall(r"`(\w+)`", said)) == imported(room)


@each_room
def test_a_room_names_the_file_to_open_first_and_the_map_leads_into_the_room(room: Path) -> None:
    first = re.search(r"(?:Open|Start with) `([\w.]+)`", said_of(room))
    assert first, room
    assert (room / f"{first[1].replace('.', '/')}.py").exists()
    assert f"{room.relative_to(ROOT)}/" in MAP.read_text()


# How to add


def additions() -> list[str]:
    """Return each step of CONTRIBUTING.md's "How to add" that links a file of code, on one line."""
    text = contents("CONTRIBUTING.md").partition("## How to add")[2].partition("## Style")[0]
    parts = [" ".join(part.split()) for part in re.split(r"\n(?=\d+\. |- )|\n\n", text)]
    return [part for part in parts if re.search(r"\]\([^)]+\.py\)", part)]


@pytest.mark.parametrize("step", additions(), ids=lambda step: step[:60])
def test_a_step_of_adding_something_names_what_is_in_the_files_that_it_links(step: str) -> None:
    linked = [ROOT / link for link in re.findall(r"\]\(([^)#]+\.(?:py|html))\)", step)]
    named = re.findall(r"`([A-Za-z_]\w*)`", step)
    code = "\n".join(path.read_text() for path in linked)
    # Its template is named by its path; macros and blocks are in those.
    code += "\n".join(
        (ROOT / "syncd/dashboard" / name).read_text() for name in re.findall(r"`(templates/\w+\.html)`", step)
    )
    assert [name for name in named if not re.search(rf"\b{name}\b", code)] == []


def test_everything_that_can_be_added_has_steps() -> None:
    assert len(additions()) > 25


# Decisions


def test_every_decision_is_in_the_index_and_has_the_four_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text()
    parts = ["Context", "Decision", "What was measured", "What would change our mind"]
    for path in folder.glob("*.md"):
        if path.name != "index.md":
            assert f"({path.name})" in index
            assert re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE) == parts, path.name
