"""A newcomer's path, timed: `python -m tests.newcomer` goes from a clone to the first usage table.

What is committed is cloned, into an empty folder; packages are downloaded afresh. Needs the network.
With `--as-it-is` changes that are not committed are laid over the clone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.checkout import clone, lay_changes_over


def get(folder: Path, *, as_it_is: bool) -> None:
    """Put the repository into a folder that is not there yet."""
    clone(folder)
    if as_it_is:
        lay_changes_over(folder)


def report(taken: Sequence[tuple[str, float]]) -> str:
    """Return the steps with their seconds, and the sum, one in each line."""
    lines = [*taken, ("in all", sum(seconds for _, seconds in taken))]
    return "".join(f"{name:<12}{seconds:6.1f} s\n" for name, seconds in lines)


def main(arguments: list[str]) -> None:
    """Clone, install, run the demo; print how long each took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PIP_NO_CACHE_DIR"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kong-openmeter"
        steps: tuple[tuple[str, Callable[[], object]], ...] = (
            ("clone", lambda: get(copy, as_it_is="--as-it-is" in arguments)),
            ("make setup", lambda: subprocess.run(["make", "setup"], cwd=copy, env=environment, check=True)),
            ("make demo", lambda: subprocess.run(["make", "demo"], cwd=copy, env=environment, check=True)),
        )
        taken = []
        for name, step in steps:
            start = time.monotonic()
            step()
            taken.append((name, time.monotonic() - start))
    print(report(taken), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
