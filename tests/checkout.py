"""A clone of this repository. Nothing but the standard library: newcomer.py runs before `make setup`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]


def is_repository() -> bool:
    """Say whether there is something to clone; in an unpacked source distribution there is not."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return False
    try:
        return bool(_git("rev-parse", "--verify", "HEAD"))
    except RuntimeError:
        return False


def clone(folder: Path) -> None:
    """Clone what is committed into a folder that is not there yet."""
    _git("clone", "--quiet", str(ROOT), str(folder))


def lay_changes_over(folder: Path) -> None:
    """Bring what is changed, new or deleted here, and not ignored, into a clone."""
    changed = _git("diff", "--name-only", "--no-renames", "-z", "HEAD")
    new = _git("ls-files", "-z", "--others", "--exclude-standard")
    for name in filter(None, (changed + new).split("\0")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # deleted, perhaps only just
            shutil.copy2(ROOT / name, folder / name)


def copy(folder: Path) -> None:
    """Copy what a clone would have, from where there is no repository."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored))


def _git(*arguments: str) -> str:
    with _configuration() as variables:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, env=variables, capture_output=True, check=False, text=True
        )
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def _configuration() -> Iterator[dict[str, str]]:
    """Yield the environment of a git that has no settings but the one that it needs.

    In a container the checkout often belongs to another user, whom git would not trust. A file, since git
    does not hand what is set on its command line on to the process that reads the repository.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with tempfile.NamedTemporaryFile("w", suffix=".gitconfig") as file:
        file.write("[safe]\n\tdirectory = *\n")
        file.flush()
        yield kept | {"GIT_CONFIG_GLOBAL": file.name, "GIT_CONFIG_NOSYSTEM": "1"}
