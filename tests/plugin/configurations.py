"""Helpers for configuration tests: a valid configuration and changes to it."""

from __future__ import annotations

from typing import Any

from openmeter_plugin.config.instance_config import PluginConfig, parse_config

ENDPOINT = "https://eu.api.konghq.com/v3/openmeter/events"
SECRET = "s3cr3t-value-of-this-test"

Config = dict[str, Any]


def config(**changes: object) -> Config:
    return {"ingest_endpoint": ENDPOINT, "api_token": SECRET} | changes


def parsed(**changes: object) -> PluginConfig:
    return parse_config(config(**changes))[0]
