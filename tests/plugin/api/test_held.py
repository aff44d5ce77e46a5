"""A destination that is held is in readiness and metrics, with the reason."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from openmeter_plugin.delivery.options import TOKEN_VARIABLE
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually, plugin_server
from tests.plugin.deliveries import record, spooled
from tests.plugin.events_server import EventsServer, refusal, serving
from tests.plugin.spools import QUEUE, destination

pytestmark = pytest.mark.slow


def test_a_held_destination_is_not_ready_and_says_why(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/api"
    (tmp_path / "spool").mkdir()
    with serving(EventsServer(lambda _: refusal(400, "the schema has changed"))) as server:
        write_destination(tmp_path / "spool", destination(server.url))
        spooled(tmp_path / "spool", [record(n) for n in range(150)])
        with (
            plugin_server(tmp_path, "--api", address, environment={TOKEN_VARIABLE: ""}),
            httpx.Client(
                transport=httpx.HTTPTransport(uds=f"{tmp_path}/api"), base_url="http://plugin", timeout=60
            ) as client,
        ):
            eventually((tmp_path / "api").exists, seconds=60, what="the API")

            def problems() -> list[str]:
                found: list[str] = client.get("/readyz").json()["problems"]
                return [problem for problem in found if "is held" in problem]

            (problem,) = eventually(problems, seconds=60, what="the problem")
            assert f"destination {QUEUE} is held: the metering API refuses nearly everything" in problem
            assert "the schema has changed" in problem
            metrics = client.get("/metrics").text
            held = f'openmeter_plugin_delivery_held{{destination="{QUEUE}",reason='
            assert f'{held}"refusals"}} 1.0' in metrics
            assert f'{held}"token"}} 0.0' in metrics
