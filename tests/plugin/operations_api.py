"""Helpers for tests of the HTTP API: a plugin server with an API, on a spool with a history."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from openmeter_plugin.api.access import TOKEN_VARIABLE
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.plugin.deliveries import record, rejects, skip, spooled
from tests.plugin.events_server import EventsServer, serving
from tests.plugin.spools import destination

ADMIN_TOKEN = "token-of-the-operations-api"
EVENTS_TOKEN = "token-for-the-metering-api"
OLD, NEW = "2026-11-20T05:49:03.779Z", "2026-11-22T07:00:00.000Z"


@dataclass
class Api:
    """A running plugin server with its API."""

    client: httpx.Client
    server: PluginServer
    events: EventsServer
    url: str

    def get(self, path: str, **parameters: str | int) -> Any:
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> dict[str, float]:
        """Return the samples by name and labels."""
        text = self.client.get("/metrics").text
        found = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in found}


def address_of(server: PluginServer) -> str:
    """Return the API's URL, read from the log."""
    pattern = r'"on": ?\[[^]]*"(127\.0\.0\.1:\d+)"'
    return f"http://{eventually(lambda: re.findall(pattern, server.log_text()), what='listening')[0]}"


@contextmanager
def api(directory: Path, *arguments: str, history: bool = True) -> Iterator[Api]:
    """Run a server with an API. History: 5 events delivered, 1 refused, 2 requests skipped."""
    with serving(EventsServer(rejects({"event-000003"}))) as events:
        spool = directory / "spool"
        write_destination(spool, destination(events.url, token=EVENTS_TOKEN))
        if history:
            spooled(spool, [*(record(n, time=OLD) for n in range(4)), skip(), skip("status_excluded")])
            spooled(spool, [record(4, 5, time=NEW, subject="consumer:bob")])
        environment = {TOKEN_VARIABLE: ADMIN_TOKEN}
        with plugin_server(directory, "--api", "127.0.0.1:0", *arguments, environment=environment) as server:
            url = address_of(server)
            headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
            with httpx.Client(base_url=url, headers=headers, timeout=15) as client:
                found = Api(client, server, events, url)
                if history:
                    eventually(lambda: found.get("/v1/spool")["total"]["books"]["dead_lettered"] == 1)
                    eventually(lambda: found.get("/v1/spool")["total"]["backlog"] == 0)
                yield found
