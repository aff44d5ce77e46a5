"""What the tests of restarts share: requests of a plugin instance, and how many have arrived."""

from __future__ import annotations

import httpx

from tests.harness.kong import PluginInstance
from tests.harness.recordings import Recorded, serialized

TOKEN = "token-of-this-test"


def plugin(sandbox: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "api_token": TOKEN,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "restarted",
        }
    )


def request(number: int) -> tuple[Recorded, str]:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    request_id = f"{number:032x}"
    return Recorded(request_id, template.log.replace(original, request_id.encode())), request_id


def stored(sandbox: str) -> int:
    headers = {"authorization": f"Bearer {TOKEN}"}
    stats = httpx.get(f"{sandbox}/sandbox/v1/stats", headers=headers, trust_env=False).json()
    return int(stats["events_stored"])
