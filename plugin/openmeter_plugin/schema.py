"""What Kong is told of the plugin: name, priority, version and the schema that Kong itself validates with.

The names, meanings and defaults of Kong's own `metering-and-billing` plugin are kept (its published
schema, 3.15), so that a user moves over by changing the plugin's name. What we add stands at the end.
Imports nothing but the standard library: Kong waits for `openmeter-plugin info` when it starts.
"""

from __future__ import annotations

from typing import Any, Final

from openmeter_plugin import __version__

NAME: Final = "openmeter"

PRIORITY: Final = 15
"""Before every bundled log plugin: their `custom_fields_by_lua` edits the shared record."""

VERSION: Final = __version__

PHASES: Final = ("log",)

Field = dict[str, Any]

LOOKUP_PLACES: Final = ("application", "consumer", "header", "query")


def _lookup_fields(default: str | None) -> list[Field]:
    place: Field = {"type": "string", "one_of": list(LOOKUP_PLACES)}
    place |= {"default": default} if default else {"required": True}
    return [{"look_up_value_in": place}, {"field": {"type": "string", "len_min": 1}}]


_FALLBACKS: Field = {
    "type": "array",
    "elements": {"type": "record", "fields": _lookup_fields(None)},
    "default": [{"look_up_value_in": "application"}],
}

_ATTRIBUTE: Field = {
    "type": "record",
    "fields": [
        {"source": {"type": "string", "required": True, "one_of": ["header", "query"]}},
        {"look_up_value_in": {"type": "string", "required": True, "len_min": 1}},
        {"event_property_name": {"type": "string", "required": True, "len_min": 1}},
    ],
}

_QUEUE: list[Field] = [
    {"max_batch_size": {"type": "integer", "default": 500, "between": [1, 1_000_000]}},
    {"max_coalescing_delay": {"type": "number", "default": 1, "between": [0, 3600]}},
    {"initial_retry_delay": {"type": "number", "default": 0.01, "between": [0.001, 1_000_000]}},
    {"max_retry_delay": {"type": "number", "default": 60, "between": [0.001, 1_000_000]}},
    # Accepted without effect: in Kong's queue these bound how much is kept before it is dropped.
    {"max_retry_time": {"type": "number"}},
    {"max_entries": {"type": "integer", "between": [1, 1_000_000]}},
    {"max_bytes": {"type": "integer"}},
    {"concurrency_limit": {"type": "integer", "default": 1, "one_of": [-1, 1]}},
]

FIELDS: Final[list[Field]] = [
    {"ingest_endpoint": {"type": "string", "required": True, "referenceable": True}},
    # Not required as in Kong's plugin: a self-hosted OpenMeter may well have no token.
    {"api_token": {"type": "string", "referenceable": True, "encrypted": True}},
    {"meter_api_requests": {"type": "boolean", "default": True}},
    {"meter_ai_token_usage": {"type": "boolean", "default": True}},
    {
        "subject": {
            "type": "record",
            "fields": [*_lookup_fields("consumer"), {"fallbacks": _FALLBACKS}],
        }
    },
    {"attributes": {"type": "array", "elements": _ATTRIBUTE}},
    {"ssl_verify": {"type": "boolean", "default": True}},
    {"timeout": {"type": "number", "default": 10_000, "gt": 0}},
    {"keepalive": {"type": "number", "default": 60_000, "between": [0, 1_000_000_000]}},
    {"queue": {"type": "record", "fields": _QUEUE}},
    # Below: what Kong's plugin does not have.
    {"source": {"type": "string", "default": "kong", "len_min": 1, "len_max": 256}},
    {"meter_anonymous_consumer": {"type": "boolean", "default": False}},
    {
        "application_context": {
            "type": "string",
            "default": "when_needed",
            "one_of": ["when_needed", "always", "never"],
        }
    },
]


def plugin_info() -> dict[str, Any]:
    """Return what Kong's query command expects for the ProtoBuf:1 protocol (Kong 3.9, `process.lua`)."""
    plugin = {
        "Name": NAME,
        "Phases": list(PHASES),
        "Priority": PRIORITY,
        "Version": VERSION,
        "Schema": {"name": NAME, "fields": [{"config": {"type": "record", "fields": FIELDS}}]},
    }
    return {"Protocol": "ProtoBuf:1", "Plugins": [plugin]}
