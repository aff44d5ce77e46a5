"""The level and summary of a gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config.settings import load
from syncd.core.errors import GatewayError
from syncd.dashboard.health import GatewayState, gateway_named, read_state
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway


def state_of(folder: Path, fake: FakeGateway) -> GatewayState:
    with gateway(fake) as there:
        path = folder / "syncd.yaml"
        path.write_text(
            "sources: [{type: static, subjects: []}]\nmetering: {url: 'http://127.0.0.1:9'}\n"
            + configured(eu=there.url)
        )
        found = gateway_named(load(path), "eu")
        assert found
        index, config = found
        return read_state(config, index)


@pytest.mark.parametrize(
    ("fake", "level", "said"),
    [
        (FakeGateway(backlog=2), "ok", "2 events waiting"),
        (FakeGateway(backlog=1, oldest_seconds=899), "ok", "1 event waiting"),
        (FakeGateway(backlog=1, oldest_seconds=901), "warning", "events have been waiting for 15 min 1 s"),
        (FakeGateway(dead=[dead_letter(1)]), "warning", "1 dead letter"),
        (FakeGateway(quarantined=2), "warning", "2 requests in quarantine"),
        (
            FakeGateway(lost={"disk_full": 2, "memory": 1}),
            "warning",
            "3 requests lost (disk_full 2, memory 1)",
        ),
        (
            FakeGateway(ai_usage_gaps={"ai_output_unknown": 2, "ai_statistics_off": 5}),
            "warning",
            "AI usage unknown for 7 requests",
        ),
        (FakeGateway(delivery_running=False), "problem", "no delivery process is running on its spool"),
        (FakeGateway(ready=False, problems=["the spool is full"]), "problem", "the spool is full"),
        (
            FakeGateway(ready=False, problems=["a", "b"], quarantined=1),
            "problem",
            "a; b; 1 request in quarantine",
        ),
    ],
)
def test_a_gateway_has_a_level_and_a_summary(
    tmp_path: Path, fake: FakeGateway, level: str, said: str
) -> None:
    state = state_of(tmp_path, fake)
    assert (state.level, state.summary) == (level, said)


def test_a_dead_gateway_is_tried_once_and_named(tmp_path: Path) -> None:
    path = tmp_path / "syncd.yaml"
    path.write_text(
        "sources: [{type: static, subjects: []}]\nmetering: {url: 'http://127.0.0.1:9'}\n"
        + configured(eu="http://127.0.0.1:9")
    )
    config = load(path)
    with pytest.raises(GatewayError, match="gateway eu"):
        read_state(config.gateways[0], 0)
    assert gateway_named(config, "us") is None
