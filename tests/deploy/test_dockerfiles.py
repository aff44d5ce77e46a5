"""What the Dockerfiles promise, as far as it can be seen without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from openmeter_plugin import __version__
from tests.deploy.files import DOCKERFILES, ROOT, copied_from_context, instructions, last_stage, service

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IGNORED = [
    line.removeprefix("!")
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line.startswith("!")
]

both = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)


@both
def test_every_path_that_is_copied_exists_and_is_not_ignored(dockerfile: Path) -> None:
    for path in copied_from_context(dockerfile):
        assert (ROOT / path).exists(), path
        assert any(path == kept or path.startswith(f"{kept}/") for kept in IGNORED), path


@both
def test_what_is_copied_is_enough_to_build_the_package(dockerfile: Path) -> None:
    copied = copied_from_context(dockerfile)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"]
    needed += [*wheel["packages"], *wheel["force-include"]]
    for path in needed:
        assert any(path == c or path.startswith(f"{c}/") for c in copied), path


@both
def test_the_versions_are_those_that_are_tested(dockerfile: Path) -> None:
    runs = " ".join(i.text for i in instructions(dockerfile) if i.name == "RUN")
    assert "--constraint .ci/constraints.txt" in runs


@both
def test_the_base_is_one_exact_python_that_the_project_supports(dockerfile: Path) -> None:
    (image, *alias), *stages = (i.words for i in instructions(dockerfile) if i.name == "FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", image)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["project"]["classifiers"]
    assert alias == ["AS", "base"]
    assert [stage[0] for stage in stages] == ["base", "base"]


@both
def test_the_labels_name_the_version_of_the_project(dockerfile: Path) -> None:
    (label,) = (i.text for i in last_stage(dockerfile) if i.name == "LABEL")
    assert f'org.opencontainers.image.version="{__version__}"' in label
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in label


@both
def test_the_healthcheck_is_the_one_of_the_compose_file(dockerfile: Path) -> None:
    (check,) = (i.text for i in last_stage(dockerfile) if i.name == "HEALTHCHECK")
    program = json.loads(check.partition("CMD ")[2])
    wanted: list[str] = service(dockerfile.parent.name)["healthcheck"]["test"]
    on_one_line = wanted[-1].strip().replace("\n", "; ").replace('"', "'")
    assert ["CMD", *program] == [*wanted[:-1], on_one_line]


@both
def test_the_image_runs_as_a_user_without_privileges_given_by_number(dockerfile: Path) -> None:
    stage = last_stage(dockerfile)
    (user,) = (i.words[0] for i in stage if i.name == "USER")
    made = re.search(r"useradd --uid (\d+) --gid (\d+)", " ".join(i.text for i in stage))
    assert made is not None
    assert user == f"{made[1]}:{made[2]}"
    assert int(made[1]) > 0


@both
def test_the_entrypoint_is_in_exec_form_so_that_it_gets_the_signals(dockerfile: Path) -> None:
    for name in ("ENTRYPOINT", "CMD"):
        for instruction in last_stage(dockerfile):
            if instruction.name == name:
                assert instruction.text.startswith("["), instruction


def test_the_entrypoints_exist() -> None:
    programs = {}
    for dockerfile in DOCKERFILES:
        (entrypoint,) = (i.words for i in last_stage(dockerfile) if i.name == "ENTRYPOINT")
        programs[dockerfile.parent.name] = entrypoint
    assert programs["syncd"] == ["syncd"]
    assert "syncd" in PROJECT["project"]["scripts"]
    assert programs["plugin"] == ["openmeter-plugin-entrypoint"]
    copies = {i.words[-1]: i.words[0] for i in last_stage(DOCKERFILES[0]) if i.name == "COPY"}
    script = ROOT / copies["/usr/local/bin/openmeter-plugin-entrypoint"]
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/sh\n")
    assert re.search(r"^exec openmeter-plugin serve ", script.read_text(), re.MULTILINE)


def test_the_spool_is_a_volume_even_where_nobody_thinks_of_one() -> None:
    (volume,) = (i.words for i in last_stage(DOCKERFILES[0]) if i.name == "VOLUME")
    spool = re.search(r"OPENMETER_PLUGIN_SPOOL=(\S+)", DOCKERFILES[0].read_text())
    assert spool is not None
    assert spool[1].startswith(f"{volume[0]}/")


@both
def test_a_volume_has_its_owner_before_it_is_declared(dockerfile: Path) -> None:
    stage = last_stage(dockerfile)
    (volume,) = (number for number, i in enumerate(stage) if i.name == "VOLUME")
    folder = stage[volume].words[0]
    before = " ".join(i.text for i in stage[:volume] if i.name == "RUN")
    assert re.search(rf"install -d -o openmeter -g openmeter -m 0750 .*{re.escape(folder)}\b", before)


def test_the_plugin_folder_still_holds_one_python_file_for_the_stock_plugin_server() -> None:
    assert [path.name for path in (ROOT / "plugin").glob("*.py")] == ["openmeter.py"]
