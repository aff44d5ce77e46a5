"""The plugin's description for Kong: name, priority, version, and the schema that Kong validates with.

Names, meanings and defaults of Kong's own `metering-and-billing` plugin are kept (its published schema,
3.15), so that users can migrate by changing the plugin's name. Additional fields come last in their record.
Once published, a record only gets new fields that are optional and have no default: a control plane fills
defaults in, and a data plane with an older schema would reject them.

`description` is an attribute of Kong's schemas (3.4 and newer); docs/plugin-settings.md is generated from
it. Imports only the standard library: Kong waits for `openmeter-plugin info` when it starts.

`schema_lua` renders the schema as Lua for a control plane that cannot query the plugin server, such as
Konnect. Konnect wants one file without `require`, so what Kong's `typedefs` would provide is written out.
"""

from __future__ import annotations

import json
from typing import Any, Final

from openmeter_plugin import __version__

NAME: Final = "openmeter"

PRIORITY: Final = 15
"""Runs before every bundled log plugin: their `custom_fields_by_lua` edits the shared log."""

VERSION: Final = __version__

PHASES: Final = ("log",)

Field = dict[str, Any]

LOOKUP_PLACES: Final = ("application", "consumer", "header", "query")
ATTRIBUTE_PLACES: Final = ("header", "query", "response_header", "path_capture", "consumer_tag")


def _field(name: str, kind: str, description: str, **attributes: Any) -> dict[str, Field]:
    return {name: {"type": kind, **attributes, "description": description}}


def _record(name: str, description: str, fields: list[Field], **attributes: Any) -> dict[str, Field]:
    return _field(name, "record", description, fields=fields, **attributes)


def _array(name: str, description: str, elements: Field, **attributes: Any) -> dict[str, Field]:
    return _field(name, "array", description, elements=elements, **attributes)


def _required_where(field: str, value: list[str], needed: str) -> Field:
    """Return an entity check: if `field` has one of the values, the field `needed` is required."""
    # Without `required`, Kong treats an unset field as a match.
    condition = {"if_field": field, "if_match": {"one_of": value, "required": True}}
    return {"conditional": condition | {"then_field": needed, "then_match": {"required": True}}}


def _one_of_where(field: str, value: str, narrowed: str, allowed: list[str]) -> Field:
    """Return an entity check: if `field` has the value, `narrowed` is unset or one of these."""
    condition = {"if_field": field, "if_match": {"eq": value, "required": True}}
    return {"conditional": condition | {"then_field": narrowed, "then_match": {"one_of": allowed}}}


# Not for `fallbacks`, which has a default: Kong validates a field's default and its elements in the order of
# its hash tables, and one start in six fails if the elements of a default have checks (3.9.1).
_LOOKUP_CHECKS: Final[list[Field]] = [
    _required_where("look_up_value_in", ["header", "query"], "field"),
    _one_of_where("look_up_value_in", "consumer", "field", ["id", "username", "custom_id", "tag"]),
    _one_of_where(
        "look_up_value_in",
        "application",
        "field",
        ["id", "application_id", "developer_id", "portal_id", "organization_id"],
    ),
]


def _lookup_fields(default: str | None) -> list[Field]:
    attributes: Field = {"default": default} if default else {"required": True}
    return [
        _field(
            "look_up_value_in",
            "string",
            "Where to look for the subject. `application`: the Dev Portal application that Konnect"
            " authenticated; it costs Kong a round trip. `header` and `query`: a value that the client"
            " chooses, see `require_consumer`.",
            one_of=list(LOOKUP_PLACES),
            **attributes,
        ),
        _field(
            "field",
            "string",
            "Consumer: `id` (default, sent as `consumer:<id>`), `username`, `custom_id`, or `tag`: the key in"
            " its tag `customer:<key>`. Application: `id` (default, sent as `app:<id>`),"
            " `developer_id`, `portal_id`, `organization_id`. Header or query: the name.",
            len_min=1,
        ),
    ]


_SUBJECT: Final[list[Field]] = [
    *_lookup_fields("consumer"),
    _array(
        "fallbacks",
        "Where to look next, in this order, if the first place has no subject. Empty list: nowhere.",
        {"type": "record", "fields": _lookup_fields(None)},
        default=[{"look_up_value_in": "application"}],
    ),
    _field(
        "require_consumer",
        "boolean",
        "Accept a subject from a header or query argument only if a consumer has authenticated (not the"
        " anonymous one). Otherwise any client can bill any customer by sending its name. Default: false.",
    ),
    _field(
        "missing",
        "string",
        "What to do with a request that has no subject: `skip` (default) counts it by reason, `fallback`"
        " bills `fallback_subject`, `quarantine` keeps it redacted in the spool for a replay.",
        one_of=["skip", "fallback", "quarantine"],
    ),
    _field(
        "fallback_subject",
        "string",
        "The subject that `missing: fallback` bills. Required with it.",
        len_min=1,
        len_max=1024,
    ),
]

_ATTRIBUTE: Final[Field] = {
    "type": "record",
    "fields": [
        _field(
            "source",
            "string",
            "Where the value comes from: a request header, query argument, response header, named capture of"
            " the route's path (it costs Kong a round trip), the text after `<name>:` in a tag of the"
            " consumer, or `value` (`constant`).",
            required=True,
            one_of=[*ATTRIBUTE_PLACES, "constant"],
        ),
        _field(
            "look_up_value_in",
            "string",
            "The name of the header, argument, capture or tag. Required unless the source is `constant`."
            " Names that carry credentials, such as `authorization` or `set-cookie`, are rejected.",
            len_min=1,
        ),
        _field(
            "event_property_name",
            "string",
            "The property of the event's data. If several attributes set the same property, the first one"
            " with a value wins.",
            required=True,
            len_min=1,
        ),
        _field("value", "string", "The value of a `constant`. Required with it.", len_min=1),
    ],
    "entity_checks": [
        _required_where("source", list(ATTRIBUTE_PLACES), "look_up_value_in"),
        _required_where("source", ["constant"], "value"),
    ],
}

_UNIT: Final[Field] = {
    "type": "record",
    "fields": [
        _field("name", "string", "The event property, such as `credits`.", required=True, len_min=1),
        _field(
            "expression",
            "string",
            "Arithmetic over `input`, `cache_read`, `cache_write`, `output`, `reasoning` (the call's tokens,"
            " each in one of them) and `cost`, such as `input + 1.25 * cache_write + 4 * output`; what it"
            " does not name counts 0. Functions: `min`, `max`, `ceil`, `floor`.",
            required=True,
            len_min=1,
            len_max=500,
        ),
    ],
}

_NAME: Final[Field] = {"type": "string", "len_min": 1}

_FILTERS: Final[list[Field]] = [
    _array(
        "statuses",
        "Response statuses, as numbers or ranges: `404`, `200-299`.",
        {
            "type": "string",
            "match_any": {
                "patterns": ["^[1-5]%d%d$", "^[1-5]%d%d%-[1-5]%d%d$"],
                "err": "must be a status such as 404 or a range such as 200-299",
            },
        },
        len_min=1,
    ),
    _array("methods", "Request methods, such as `GET`.", _NAME, len_min=1),
    _array("routes", "Routes, by name or id. A request without a route is excluded.", _NAME, len_min=1),
    _array("services", "Services, by name or id. A request without a service is excluded.", _NAME, len_min=1),
    _array(
        "response_sources",
        "Who responded: `upstream`, or `kong` itself (request rejected, rate limited, upstream not reached).",
        {"type": "string", "one_of": ["kong", "upstream"]},
        len_min=1,
    ),
    _field(
        "upstream_answered",
        "boolean",
        "`true`: only requests that the upstream answered. Excludes responses of Kong itself, and requests"
        " whose client was gone before the answer (status 499, or 400 while it sent its body).",
    ),
]

_NO_EFFECT: Final = "Accepted, but has no effect: Kong's queue would drop events, the spool keeps them."

_NO_EFFECT_BREAKER: Final = (
    "Accepted, but has no effect: after so many failures Kong's queue would drop events. The plugin pauses"
    " delivery and retries with one batch; the events wait in the spool."
)

_QUEUE: Final[list[Field]] = [
    _field("max_batch_size", "integer", "Events in one POST.", default=500, between=[1, 1_000_000]),
    _field(
        "max_coalescing_delay",
        "number",
        "Seconds to wait for more events before a POST.",
        default=1,
        between=[0, 3600],
    ),
    _field(
        "initial_retry_delay",
        "number",
        "Seconds before the first retry of a failed POST. The delay doubles up to `max_retry_delay`.",
        default=0.01,
        between=[0.001, 1_000_000],
    ),
    _field(
        "max_retry_delay",
        "number",
        "Maximum seconds between two retries. Retries never end.",
        default=60,
        between=[0.001, 1_000_000],
    ),
    _field("max_retry_time", "number", _NO_EFFECT),
    _field("max_entries", "integer", _NO_EFFECT, between=[1, 1_000_000]),
    _field("max_bytes", "integer", _NO_EFFECT),
    _field("failure_threshold", "integer", _NO_EFFECT_BREAKER, between=[0, 1_000_000]),
    _field("breaker_cooldown", "number", _NO_EFFECT_BREAKER),
    _field(
        "concurrency_limit",
        "integer",
        "Concurrent POSTs for each destination: 1, or with -1 up to four (unlimited in Kong's queue). Use -1"
        " for a distant metering API and a gateway that serves thousands of requests per second.",
        default=1,
        one_of=[-1, 1],
    ),
]

FIELDS: Final[list[Field]] = [
    _field(
        "ingest_endpoint",
        "string",
        "The URL that events are posted to. OpenMeter: `http://HOST/api/v1/events`."
        " Konnect: `https://REGION.api.konghq.com/v3/openmeter/events`.",
        match_any={
            "patterns": ["^%s*https?://[^%s%?@]+%s*$"],
            "err": "must be an http or https URL without credentials or a query",
        },
        required=True,
        referenceable=True,
    ),
    # Required in Kong's plugin, optional here: a self-hosted OpenMeter may have no token.
    _field(
        "api_token",
        "string",
        "The bearer token for the endpoint. A self-hosted OpenMeter may need none.",
        referenceable=True,
        encrypted=True,
    ),
    _field(
        "meter_api_requests", "boolean", "Send one event `kong.api_request` for each request.", default=True
    ),
    _field(
        "meter_ai_token_usage",
        "boolean",
        "Send events `kong.llm_request` for the input and output tokens that an AI plugin logged.",
        default=True,
    ),
    _record(
        "subject",
        "Who pays for a request: the first place that has a subject.",
        _SUBJECT,
        entity_checks=[*_LOOKUP_CHECKS, _required_where("missing", ["fallback"], "fallback_subject")],
    ),
    _array("attributes", "Further values of a request to add to the data of its events.", _ATTRIBUTE),
    _field("ssl_verify", "boolean", "Verify the endpoint's certificate.", default=True),
    _field("timeout", "number", "Milliseconds to wait for the response to a POST.", default=10_000, gt=0),
    _field(
        "keepalive",
        "number",
        "Milliseconds to keep an idle connection to the endpoint open.",
        default=60_000,
        between=[0, 1_000_000_000],
    ),
    _record("queue", "How events are batched and retried.", _QUEUE),
    _array(
        "allow_status_codes",
        "Meter only requests with these response statuses, as numbers or ranges: `404`, `200-299`. Kong's"
        " name (3.16) for `filters.statuses`; set one of the two.",
        {"type": "string", "len_min": 1},
    ),
    # Fields below are not in Kong's plugin.
    _field(
        "source",
        "string",
        "The events' `source`, a URI reference (`host:port` is none). Use the same on all nodes of a cluster:"
        " source and id identify an event.",
        default="kong",
        len_min=1,
        len_max=256,
        # The plugin checks the rest: a port that is no number and broken escapes.
        match_any={
            "patterns": ["^%a[%w+.-]*:", "^[^:]*$", "^[^:]*[/?#]"],
            "err": "must be a URI reference, such as kong or urn:kong:eu; host:port is none, //host:port is",
        },
    ),
    _field(
        "ai_tokens",
        "string",
        "How the tokens of an AI call become events: `kong` (the default: two sums, `input` and `output`, as"
        " Kong's plugin) or `split` (`input`, `cache_read`, `cache_write`, `output`, `reasoning`, each with"
        " its `modality`, and each token in one of them).",
        one_of=["kong", "split"],
    ),
    _field(
        "ai_cache_hits",
        "string",
        "A call that Kong's semantic cache answered: `mark` (the default: its events have the type"
        " `kong.llm_cache_hit`, so meters of provider tokens leave it out), `bill` (like any other call) or"
        " `skip`.",
        one_of=["bill", "mark", "skip"],
    ),
    _field(
        "meter_ai_calls",
        "boolean",
        "Send one event `kong.llm_call` for each AI call, with its tokens, its cost as Kong logged it, its"
        " latency and its `units`. Off by default.",
    ),
    _field(
        "meter_agent_requests",
        "boolean",
        "Send one event `kong.mcp_request` or `kong.a2a_request` for each request of an agent that Kong's"
        " MCP or A2A plugin logged. On by default.",
    ),
    _array(
        "units",
        "Quantities computed from the tokens of an AI call, such as credits. Each becomes a property of"
        " `kong.llm_call`, which is then sent whatever `meter_ai_calls` is.",
        _UNIT,
    ),
    _record(
        "subject_prefixes",
        "What precedes an id in a subject. Set the same in syncd's `mapping.subject_prefixes`.",
        [
            _field("consumer", "string", "Default: `consumer:`.", len_min=1, len_max=64),
            _field("application", "string", "Default: `app:`, as Kong's own plugins.", len_min=1, len_max=64),
        ],
    ),
    _field(
        "meter_anonymous_consumer",
        "boolean",
        "Bill an authentication plugin's `anonymous` consumer like any other.",
        default=False,
    ),
    _field(
        "application_context",
        "string",
        "When to query Kong for the Dev Portal application, which costs it a round trip: `when_needed`"
        " (for the subject), `always` (events of consumers then have `application_id`, too) or `never`.",
        default="when_needed",
        one_of=["when_needed", "always", "never"],
    ),
    _record(
        "filters",
        "Which requests are metered: those that match every filter that is set. An excluded request has no"
        " events, neither for itself nor for its tokens, and is counted by the filter that excluded it.",
        _FILTERS,
    ),
]


def plugin_info() -> dict[str, Any]:
    """Return the document that Kong's query command expects for ProtoBuf:1 (Kong 3.9, `process.lua`)."""
    plugin = {
        "Name": NAME,
        "Phases": list(PHASES),
        "Priority": PRIORITY,
        "Version": VERSION,
        "Schema": {"name": NAME, "fields": [{"config": {"type": "record", "fields": FIELDS}}]},
    }
    return {"Protocol": "ProtoBuf:1", "Plugins": [plugin]}


def info_json() -> str:
    """Return what Kong's query command has to print."""
    return json.dumps(plugin_info())


def info_lua() -> str:
    """Return a Lua program that prints it, for images of Kong that have LuaJIT but no cat."""
    return f"io.write({lua_text(info_json())})\n"


_PROTOCOLS: Final = ["grpc", "grpcs", "http", "https"]

_LUA_WIDTH: Final = 100


def schema() -> Field:
    """Return the complete schema, with the protocols that Kong adds to a plugin server's schema itself.

    It has no field `consumer`: the plugin may be scoped to a consumer, as well as to a route or a service.
    """
    protocols = {
        "type": "set",
        "required": True,
        "default": _PROTOCOLS,
        "elements": {"type": "string", "one_of": _PROTOCOLS},
    }
    config = {"type": "record", "fields": FIELDS}
    return {"name": NAME, "fields": [{"protocols": protocols}, {"config": config}]}


def schema_lua() -> str:
    """Return the schema as a Lua chunk."""
    return f"-- Schema of {NAME} {VERSION}. Generated by `openmeter-plugin`.\nreturn {lua_value(schema())}\n"


def lua_value(value: Any, indent: str = "") -> str:
    """Return the value as a Lua literal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return lua_text(value)
    inner = f"{indent}  "
    if isinstance(value, dict):
        items = [f"{name} = {lua_value(member, inner)}" for name, member in value.items()]
    else:
        items = [lua_value(item, inner) for item in value]
    flat = "{ " + ", ".join(items) + " }" if items else "{}"
    if len(indent) + len(flat) <= _LUA_WIDTH and "\n" not in flat:
        return flat
    return "{\n" + "".join(f"{inner}{item},\n" for item in items) + f"{indent}}}"


def lua_text(text: str) -> str:
    """Return the text as a Lua literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
