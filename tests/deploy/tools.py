"""Programs that the deployment tests call: from .tools/ (`make tools` installs them), else from the PATH."""

from __future__ import annotations

import shutil
from typing import Final

import pytest

from tests.deploy.files import ROOT

_FOLDER: Final = ROOT / ".tools"


def tool(name: str) -> str | None:
    """Return the path of a program, None where it is not installed."""
    return shutil.which(name, path=_FOLDER) or shutil.which(name)


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing."""
    return pytest.mark.skipif(tool(name) is None, reason=f"needs {name}: run make tools")
