"""The project's kong.yml as the demo uses it: read, pointed at loopback, its consumers with Kong's ids."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

KONG_YML: Final = Path(__file__).parents[2] / "kong.yml"
_NAMESPACE: Final = uuid.UUID("fd02801f-0957-4a15-a55a-c8d9606f30b5")


@dataclass(frozen=True)
class Consumer:
    """A consumer of kong.yml, with the id that a DB-less Kong gives it and its API key, if it has one."""

    id: str
    username: str
    custom_id: str | None
    tags: tuple[str, ...]
    key: str | None

    @property
    def subject(self) -> str:
        """The subject of its usage under the plugin's defaults."""
        return f"consumer:{self.id}"


@dataclass(frozen=True)
class Gateway:
    """kong.yml with the URLs of this demo in the place of docker-compose's."""

    document: dict[str, Any]

    @classmethod
    def load(cls, ingest_endpoint: str, upstream: str = "http://127.0.0.1:9") -> Gateway:
        """Read kong.yml and point it at a metering API and an upstream."""
        document = yaml.safe_load(KONG_YML.read_text())
        for service in document["services"]:
            service["url"] = upstream
        for plugin in document["plugins"]:
            if plugin["name"] == "openmeter":
                plugin["config"]["ingest_endpoint"] = ingest_endpoint
                plugin["config"]["queue"]["max_coalescing_delay"] = 0.2
        return cls(document)

    def write(self, path: Path) -> None:
        """Write it as a declarative configuration."""
        path.write_text(yaml.safe_dump(self.document, sort_keys=False))

    def plugin_config(self, token: str) -> dict[str, object]:
        """Return the plugin's configuration as Kong passes it: the vault reference resolved."""
        (plugin,) = (p for p in self.document["plugins"] if p["name"] == "openmeter")
        config: dict[str, object] = dict(plugin["config"])
        reference = config["api_token"]
        return config | {"api_token": token, "$refs": {"api_token": reference}, "__plugin_id": "demo"}

    @property
    def consumers(self) -> list[Consumer]:
        """The consumers of the file, the anonymous one among them."""
        kind = uuid.uuid5(_NAMESPACE, "consumers")
        return [
            Consumer(
                str(uuid.uuid5(kind, entry["username"])),
                entry["username"],
                entry.get("custom_id"),
                tuple(entry.get("tags", ())),
                next((c["key"] for c in entry.get("keyauth_credentials", ())), None),
            )
            for entry in self.document["consumers"]
        ]
