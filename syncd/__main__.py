"""Entry point of the console script `syncd` and of ``python -m syncd``."""

import sys

from syncd.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
