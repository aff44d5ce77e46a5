"""Wheel and source distribution, built here, and an environment that has the wheel and what it asks for."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "kong-openmeter"
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(source: Path, target: Path, *kinds: str) -> dict[str, Path]:
    """Build distributions without asking any network; returns them by kind."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target)]
    for kind in kinds:
        command += ["--target", kind]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=100)
    endings = {"wheel": "*.whl", "sdist": "*.tar.gz"}
    return {kind: next(target.glob(endings[kind])) for kind in kinds}


def files_of_wheel(wheel: Path) -> set[str]:
    """Return the paths in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def unpacked(sdist: Path, target: Path) -> Path:
    """Unpack a source distribution and return its folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder


def needed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Return the installed distributions that requirements ask for, and those ask for, and so on."""
    found: dict[str, Distribution] = {}
    asked_for: set[tuple[str, str]] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in asked_for:
                asked_for.add((name, extra))
                found[name] = distribution(name)
                pending += _asks_for(found[name], extra)
    return found


def _asks_for(installed: Distribution, extra: str) -> Iterator[Requirement]:
    for text in installed.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """Make an environment with the wheel and the distributions that it asks for, no other; returns its bin.

    `extras` are installed as by ``pip install 'kong-openmeter[...]'``. The dependencies are those of the
    environment that runs the tests: linked, not installed again. One that the project uses without asking for
    it is not there.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=100)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    groups = PROJECT["project"]["optional-dependencies"]
    asked = [text for extra in extras for text in groups[extra]]
    found = needed([*PROJECT["project"]["dependencies"], *asked])
    found.pop(NAME, None)
    for dependency in found.values():
        _link(dependency, packages)
    subprocess.run([*pip, "check"], check=True, timeout=100)
    return folder / "bin"


def _link(installed: Distribution, packages: Path) -> None:
    """Link what a distribution has at the top of site-packages."""
    home = Path(str(installed.locate_file("")))
    tops = {file.parts[0] for file in installed.files or () if file.parts[0] not in {"..", "__pycache__"}}
    for top in tops:
        target = packages / top
        if not target.exists():
            target.symlink_to(home / top)
        elif target.is_symlink():  # a namespace of several distributions: one link shows all of it
            assert target.resolve() == (home / top).resolve()
