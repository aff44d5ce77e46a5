"""Environment variables of the plugin server: a slip is named, and never keeps a gateway from starting."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from openmeter_plugin import __file__ as package
from openmeter_plugin.cli import options
from openmeter_plugin.cli.options import warn_of_unknown_variables


def warned(*names: str) -> list[MutableMapping[str, Any]]:
    with capture_logs() as lines:
        warn_of_unknown_variables(dict.fromkeys(names, "hunter2"))
    assert "hunter2" not in str(lines)
    return lines


def test_a_variable_that_has_no_effect_is_named_with_the_one_that_was_meant() -> None:
    (line,) = warned("OPENMETER_PLUGIN_TOKN", "OPENMETER_PLUGIN_TOKEN", "PATH")
    assert line["event"] == "unknown_variable"
    assert line["variable"] == "OPENMETER_PLUGIN_TOKN"
    assert line["remedy"] == "did you mean OPENMETER_PLUGIN_TOKEN?"


@pytest.mark.parametrize(
    "name",
    [
        "OPENMETER_PLUGIN_SERVICE_HOST",
        "OPENMETER_PLUGIN_SERVICE_PORT_HTTP",
        "OPENMETER_PLUGIN_PORT",
        "OPENMETER_PLUGIN_API_PORT_8001_TCP_ADDR",
    ],
)
def test_what_kubernetes_sets_for_a_service_of_this_name_is_no_slip(name: str) -> None:
    assert warned(name) == []


def test_each_variable_that_the_package_reads_is_known() -> None:
    source = "".join(path.read_text() for path in Path(package).parent.rglob("*.py"))
    read = set(re.findall(r'"(OPENMETER_PLUGIN_[A-Z_]+)"', source))
    assert len(read) > 8
    assert read == options._VARIABLES
