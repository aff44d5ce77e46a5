"""docker-compose.yml and the Dockerfiles, read as far as the tests need them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final = ROOT / "docker-compose.yml"
DOCKERFILES: Final = (ROOT / "plugin" / "Dockerfile", ROOT / "syncd" / "Dockerfile")

_VARIABLE: Final = re.compile(r"\$\{\w+:-([^}]*)\}")


def compose() -> dict[str, Any]:
    """Return docker-compose.yml, each variable replaced by its default."""
    document: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(r"\1", COMPOSE.read_text()))
    return document


def service(name: str) -> dict[str, Any]:
    """Return one service."""
    found: dict[str, Any] = compose()["services"][name]
    return found


def mounts(name: str) -> dict[str, str]:
    """Return what a service mounts where: target -> source (a volume, or a path that begins with ./)."""
    found = {}
    for entry in service(name).get("volumes", ()):
        if isinstance(entry, dict):
            found[entry["target"]] = entry["source"]
        else:
            source, target = entry.split(":")[:2]
            found[target] = source
    return found


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments; the exec form is JSON."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile in their order."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(name, text) for name, text in (line.split(maxsplit=1) for line in joined if line)]


def last_stage(dockerfile: Path) -> list[Instruction]:
    """Return the instructions that make the image itself."""
    found = instructions(dockerfile)
    start = max(number for number, instruction in enumerate(found) if instruction.name == "FROM")
    return found[start:]


def copied_from_context(dockerfile: Path) -> list[str]:
    """Return the paths that are copied out of the repository."""
    copies = [instruction.words for instruction in instructions(dockerfile) if instruction.name == "COPY"]
    return [path for words in copies if not words[0].startswith("--from") for path in words[:-1]]
