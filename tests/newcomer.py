"""A newcomer's path, timed: `python -m tests.newcomer` goes from a clone to the first usage table.

What is committed is cloned, into an empty folder; packages are downloaded afresh. Needs the network.
With `--as-it-is` the files of the checkout are copied instead, changes that are not committed with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def clone(folder: Path, *, as_it_is: bool) -> None:
    """Put the repository into a folder that is not there yet."""
    if not as_it_is:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        return
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main(arguments: list[str]) -> None:
    """Clone, install, run the demo; print how long each took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PIP_NO_CACHE_DIR"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kong-openmeter"
        steps: tuple[tuple[str, Callable[[], object]], ...] = (
            ("clone", lambda: clone(copy, as_it_is="--as-it-is" in arguments)),
            ("make setup", lambda: subprocess.run(["make", "setup"], cwd=copy, env=environment, check=True)),
            ("make demo", lambda: subprocess.run(["make", "demo"], cwd=copy, env=environment, check=True)),
        )
        taken = []
        for name, step in steps:
            start = time.monotonic()
            step()
            taken.append((name, time.monotonic() - start))
    for name, seconds in taken:
        print(f"{name:<12}{seconds:6.1f} s")
    print(f"{'in all':<12}{sum(seconds for _, seconds in taken):6.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
