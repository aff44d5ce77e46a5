"""``make images``: builds both images on a base that debootstrap makes, and prints their sizes."""

from __future__ import annotations

import sys
import time

from tests.images.engine import BASE, NAMES, Engine, EngineError, image, missing_programs


def main() -> int:
    """Build; returns the exit status."""
    if missing := missing_programs():
        print(f"make images: nothing is built; needs {', '.join(missing)}, which are packages of Debian")
        return 0
    engine = Engine()
    try:
        started = time.monotonic()
        engine.make_base()
        base = engine.size(BASE)
        print(f"base: {base / 1e6:.1f} MB, {time.monotonic() - started:.0f} s")
        for name in NAMES:
            started = time.monotonic()
            engine.build(name)
            over = (engine.size(image(name)) - base) / 1e6
            print(f"{name}: {over:.1f} MB over the base, {time.monotonic() - started:.0f} s")
    except EngineError as error:
        print(f"make images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
