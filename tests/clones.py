"""A clone of the project to run the documentation's commands in, and a host around it.

**What is real:** `git clone` of this repository, with the changes that are not committed laid over it (where
there is no repository, as in a source distribution, a copy); shells, processes, sockets, files.
**What is shared:** the installed packages of others, because installing them again would take the better part
of a minute. The clone has an environment `.venv` of its own, interpreter and programs included, as `make
setup` leaves it; the project's packages in it are the clone's and nobody else's, those of others are found
where the environment that runs the tests has them. So `make setup` finds nothing to do in a clone;
`make newcomer` runs it for real.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import site
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from tests import checkout
from tests.harness.ports import free_port

PORTS: Final = {"sandbox": "8888", "http-log": "8095", "run": "8890", "other": "8889"}
"""The ports that commands and examples name, each replaced by a free one."""

_STATUS: Final = re.compile(r"#\s*exit status (\d+)")
_SERVES: Final = re.compile(r"\b(?:openmeter-plugin serve|syncd (?:run|sandbox))\b")
_HOST: Final = re.compile(r"(?<![\w.:/~-])/(opt|etc|run|var/lib|usr/local/lib|mnt)\b")
_SECONDS: Final = 150
_PROGRAM: Final = """\
#!/bin/sh
'''exec' '{python}' "$0" "$@"
' '''
import sys
from {module} import {first}
sys.exit({call}())
"""
"""Starts with any length of path: a first line `#!{{python}}` may hold 127 characters on older kernels."""

_BEGINNING: Final = r"""
trap 'kill $(jobs -p) 2>/dev/null' EXIT
is_open() {
  case $1 in
    /*) [ -S "$1" ] || [ -d "$1/instances" ] ;;
    *) (: </dev/tcp/127.0.0.1/$1) 2>/dev/null ;;
  esac
}
listening() {
  for _ in {1..1200}; do is_open $1 && return; sleep 0.05; done
  echo "nothing listens on $1" >&2; exit 99
}
must() { [ "$1" = "$2" ] || { echo "$3: ended with $1, not $2" >&2; exit 98; }; }
"""


@dataclass(frozen=True)
class Clone:
    """A clone, as after `make setup`, with ports of its own in the examples."""

    folder: Path
    host: Path
    """The folder that stands for the host's root."""
    ports: dict[str, str]

    @classmethod
    def make(cls, folder: Path, host: Path | None = None) -> Clone:
        """Make one in a folder that is not there yet; sockets on `host` need it to be a short path."""
        if checkout.is_repository():
            checkout.clone(folder)
            checkout.lay_changes_over(folder)
        else:
            checkout.copy(folder)
        _make_environment(folder)
        clone = cls(
            folder, host or folder.parent / "h", {named: str(free_port()) for named in PORTS.values()}
        )
        for example in (folder / "docs" / "examples").glob("*.yaml"):
            example.write_text(clone.with_its_ports(example.read_text()))
        return clone

    @property
    def environment(self) -> dict[str, str]:
        """The variables for a process in it."""
        ours = ("SYNCD_", "OPENMETER_", "MAKE", "PYTHON", "PIP_", "GIT_", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {
            "PATH": f"{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "STATE_DIRECTORY": str(self.folder / "state"),
        }

    def with_its_ports(self, text: str) -> str:
        """Return the text with the documentation's ports replaced."""
        return re.sub(r"(?<=[: ])(" + "|".join(self.ports) + r")\b", lambda match: self.ports[match[1]], text)

    def on_its_host(self, text: str) -> str:
        """Return the text with the host's folders replaced."""
        return _HOST.sub(lambda match: f"{self.host}/{match[1]}", text)

    def run(self, lines: Sequence[str], *, on_host: bool = False, **variables: str) -> str:
        """Run the commands in order, fail at the first that ends otherwise; return what they printed.

        With `on_host` the folders of the host that they name are below `host`.
        """
        typed = [self.on_its_host(line) if on_host else line for line in lines]
        log = self.folder.parent / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", self.script(typed)],
                cwd=self.folder,
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, f"{output}\n{log.read_text()}"
        return output

    def script(self, lines: Sequence[str]) -> str:
        """Return a script that ends at the first command whose exit status is not the one behind it.

        What serves until it is stopped is stopped once it listens, and must then end with 0.
        """
        script = [_BEGINNING]
        for line in lines:
            status = _STATUS.search(line)
            must = f"must $? {status[1] if status else 0} {shlex.quote(line)}"
            command = self.with_its_ports(line)
            if line.endswith("&"):
                # Whoever reads on before typing gives it that time.
                script += [command, f"listening {self._place_of(line)}"]
            elif _SERVES.search(line):
                script += [f"{command} & served=$!", f"listening {self._place_of(line)}"]
                script += ["kill $served; wait $served", must]
            else:
                script += [command, must]
        return "\n".join([*script, "wait", ""])

    def _place_of(self, line: str) -> str:
        """Return the port or the socket at which a command listens, or the folder that it reads."""
        if where := re.search(r"--(?:socket|segments) (\S+)", line):
            return where[1]
        named = next((port for port in self.ports if re.search(rf"[: ]{port}\b", line)), PORTS["run"])
        return self.ports[named]


def shared_packages() -> list[str]:
    """Return where the environment that runs the tests has its packages."""
    return [folder for folder in site.getsitepackages() if Path(folder).is_dir()]


def _make_environment(clone: Path) -> None:
    folder = clone / ".venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A line here adds a folder and does not read what lies in it, the link to the checkout least of all.
    places = [str(clone / "plugin"), str(clone), *shared_packages()]
    (packages / "clone.pth").write_text("\n".join([*places, ""]))
    for entry in entry_points(group="console_scripts"):
        program = folder / "bin" / entry.name
        first = entry.attr.partition(".")[0]
        python = folder / "bin" / "python"
        program.write_text(_PROGRAM.format(python=python, module=entry.module, first=first, call=entry.attr))
        program.chmod(0o755)
    (folder / ".ready").touch()
