"""The console script `syncd`, also ``python -m syncd``."""

import sys

from syncd.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
