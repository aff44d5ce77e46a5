"""Fixtures of the gate's Lua half."""

from __future__ import annotations

import pytest

from tests.plugin.lua.gate_node import SHELLS, Shell
from tests.plugin.lua.scripted_gate import ScriptedGate


@pytest.fixture
def gate() -> ScriptedGate:
    """Return a gate that enforces one feature for all requests."""
    return ScriptedGate()


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> Shell:
    """Return each shell in turn."""
    found: Shell = request.param
    return found
