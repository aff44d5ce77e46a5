"""What doctor says of Kong's AI plugins: statistics that are off, and miscounts of Kong's version."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from openmeter_plugin.metering.ai_usage import Version
from syncd.doctor.ai import MISCOUNTS, check_ai
from syncd.doctor.checks import Finding, Level, Plugin

ON = {"log_statistics": True}


def proxy(provider: str, logging: Mapping[str, object] = ON, **more: object) -> Plugin:
    config = {"model": {"provider": provider}, "logging": logging}
    return Plugin("ai-proxy", enabled=True, config=config, where="Kong at k", **more)  # type: ignore[arg-type]


def findings(plugin: Plugin, version: Version | None = (9, 0, 0, 0)) -> list[Finding]:
    return list(check_ai([plugin], version))


@pytest.mark.parametrize("logging", [{}, {"log_statistics": False}, None])
def test_a_plugin_whose_statistics_are_off_is_named_with_the_setting(logging: Mapping[str, object]) -> None:
    (finding,) = findings(proxy("openai", logging, entities=("route chat",)))
    assert finding.level is Level.WARNING
    assert "ai-proxy (Kong at k, plugin of route chat): logging.log_statistics is off" in finding.text


def test_each_target_of_ai_proxy_advanced_has_its_own_statistics() -> None:
    targets = [{"model": {"provider": "openai"}, "logging": logging} for logging in (ON, {})]
    plugin = Plugin("ai-proxy-advanced", enabled=True, config={"targets": targets}, where="k")
    assert ["log_statistics" in finding.text for finding in findings(plugin)] == [True]


def test_a_transformer_names_its_model_under_llm() -> None:
    config = {"llm": {"model": {"provider": "xai"}, "logging": ON}}
    plugin = Plugin("ai-request-transformer", enabled=True, config=config, where="k")
    (finding,) = findings(plugin, (3, 15, 0, 4))
    assert "Kong 3.15.0.4, xai: reasoning tokens are left out" in finding.text
    assert finding.text.endswith("fixed in 3.16.0.1")


def test_the_faults_of_a_version_that_touch_the_provider_in_use_are_named() -> None:
    found = findings(proxy("openai"), (3, 9, 1, 0))
    assert {finding.level for finding in found} == {Level.WARNING}
    assert "Kong 3.9.1, openai: streamed calls may be logged with an estimated input" in found[0].text
    assert not any("gemini" in finding.text for finding in found)


@pytest.mark.parametrize("provider", sorted({p for fault in MISCOUNTS for p in fault.providers}))
def test_a_version_with_every_fix_has_no_fault(provider: str) -> None:
    assert findings(proxy(provider), (3, 16, 0, 1)) == []


def test_the_faults_of_an_unknown_version_are_told_without_a_warning() -> None:
    (finding,) = findings(proxy("gemini"), None)
    assert finding.level is Level.OK
    assert "this source does not show Kong's version" in finding.text
    assert "fixed in 3.14.0.13 and 3.15.0.4" in finding.text


def test_disabled_and_other_plugins_are_left_alone() -> None:
    off = Plugin("ai-proxy", enabled=False, config={"model": {"provider": "openai"}}, where="k")
    other = Plugin("rate-limiting", enabled=True, config={}, where="k")
    assert list(check_ai([off, other], (3, 9, 1, 0))) == []


@pytest.mark.parametrize("config", [{}, {"targets": "x"}, {"model": 5}, {"targets": [None, 5]}, {"llm": []}])
def test_a_configuration_of_any_shape_is_survived(config: Mapping[str, object]) -> None:
    findings(Plugin("ai-proxy", enabled=True, config=config, where="k"), None)
