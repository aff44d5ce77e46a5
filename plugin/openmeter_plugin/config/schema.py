"""What Kong is told of the plugin: name, priority, version and the schema that Kong itself validates with.

The names, meanings and defaults of Kong's own `metering-and-billing` plugin are kept (its published
schema, 3.15), so that a user moves over by changing the plugin's name. What we add stands at the end of
its record. Once published, a record is only added to, with fields that are optional and have no default:
a control plane fills defaults in, and a data plane with an older schema would refuse them.

The descriptions are Kong's own attribute of a field (3.4 and newer); docs/plugin-settings.md is made of
them. Imports nothing but the standard library: Kong waits for `openmeter-plugin info` when it starts.
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
ATTRIBUTE_PLACES: Final = ("header", "query", "response_header", "path_capture", "consumer_tag")


def _field(name: str, kind: str, description: str, **attributes: Any) -> dict[str, Field]:
    return {name: {"type": kind, **attributes, "description": description}}


def _record(name: str, description: str, fields: list[Field], **attributes: Any) -> dict[str, Field]:
    return _field(name, "record", description, fields=fields, **attributes)


def _array(name: str, description: str, elements: Field, **attributes: Any) -> dict[str, Field]:
    return _field(name, "array", description, elements=elements, **attributes)


def _required_where(field: str, value: list[str], needed: str) -> Field:
    """Return a check of Kong's: where `field` is one of the values, the field `needed` must be there."""
    # Without `required` Kong takes a field that is not set for one of the values.
    condition = {"if_field": field, "if_match": {"one_of": value, "required": True}}
    return {"conditional": condition | {"then_field": needed, "then_match": {"required": True}}}


def _one_of_where(field: str, value: str, narrowed: str, allowed: list[str]) -> Field:
    """Return a check of Kong's: where `field` has the value, `narrowed` has one of these, if any."""
    condition = {"if_field": field, "if_match": {"eq": value, "required": True}}
    return {"conditional": condition | {"then_field": narrowed, "then_match": {"one_of": allowed}}}


# Not for `fallbacks`, which has a default: of a field's default and its elements Kong looks at either first,
# as its hash tables have it, and one start in six fails over a default whose elements have checks (3.9.1).
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
            " authenticated; asking for it costs Kong a round trip. `header` and `query`: what the client"
            " says, see `require_consumer`.",
            one_of=list(LOOKUP_PLACES),
            **attributes,
        ),
        _field(
            "field",
            "string",
            "Consumer: `id` (if unset; sent as `consumer:<id>`), `username`, `custom_id`, or `tag`: the key"
            " in its tag `customer:<key>`. Application: `id` (if unset; sent as `application:<id>`),"
            " `developer_id`, `portal_id`, `organization_id`. Header or query: the name.",
            len_min=1,
        ),
    ]


_SUBJECT: Final[list[Field]] = [
    *_lookup_fields("consumer"),
    _array(
        "fallbacks",
        "Where to look next, in this order, if the first place names nobody. An empty list for nowhere.",
        {"type": "record", "fields": _lookup_fields(None)},
        default=[{"look_up_value_in": "application"}],
    ),
    _field(
        "require_consumer",
        "boolean",
        "Takes a subject from a header or query argument only beside an authenticated consumer that is not"
        " the anonymous one. Without, any client bills any customer by sending its name. If unset: false.",
    ),
    _field(
        "missing",
        "string",
        "What becomes of a request for which no place names anybody: `skip` (if unset) counts it by reason,"
        " `fallback` bills `fallback_subject`, `quarantine` keeps it redacted in the spool, to be replayed.",
        one_of=["skip", "fallback", "quarantine"],
    ),
    _field(
        "fallback_subject",
        "string",
        "The subject for `missing: fallback`, where it is required.",
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
            "Where the value is: a request header, query argument, response header, named capture of the"
            " route's path (asking for it costs Kong a round trip), what stands behind `<name>:` in a tag of"
            " the consumer, or nowhere (`constant`).",
            required=True,
            one_of=[*ATTRIBUTE_PLACES, "constant"],
        ),
        _field(
            "look_up_value_in",
            "string",
            "The name of the header, argument, capture or tag. Required unless the source is `constant`."
            " Names that carry credentials, such as `authorization` or `set-cookie`, are refused.",
            len_min=1,
        ),
        _field(
            "event_property_name",
            "string",
            "The property of the event's data. Of several attributes for one property, the first that has"
            " a value counts.",
            required=True,
            len_min=1,
        ),
        _field("value", "string", "The value of a `constant`, required there.", len_min=1),
    ],
    "entity_checks": [
        _required_where("source", list(ATTRIBUTE_PLACES), "look_up_value_in"),
        _required_where("source", ["constant"], "value"),
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
    _array("routes", "Routes by name or id. A request without a route is excluded.", _NAME, len_min=1),
    _array("services", "Services by name or id. A request without one is excluded.", _NAME, len_min=1),
    _array(
        "response_sources",
        "Who answered: `upstream`, or `kong` itself (refused, limited, upstream not reached).",
        {"type": "string", "one_of": ["kong", "upstream"]},
        len_min=1,
    ),
]

_WITHOUT_EFFECT: Final = "Accepted without effect: in Kong's queue it makes events drop, here they are kept."

_QUEUE: Final[list[Field]] = [
    _field("max_batch_size", "integer", "Events in one POST.", default=500, between=[1, 1_000_000]),
    _field(
        "max_coalescing_delay",
        "number",
        "Seconds that a POST is held back for more events to come.",
        default=1,
        between=[0, 3600],
    ),
    _field(
        "initial_retry_delay",
        "number",
        "Seconds before the first retry of a POST that failed; they double up to `max_retry_delay`.",
        default=0.01,
        between=[0.001, 1_000_000],
    ),
    _field(
        "max_retry_delay",
        "number",
        "The most seconds between two retries. Retries never end.",
        default=60,
        between=[0.001, 1_000_000],
    ),
    _field("max_retry_time", "number", _WITHOUT_EFFECT),
    _field("max_entries", "integer", _WITHOUT_EFFECT, between=[1, 1_000_000]),
    _field("max_bytes", "integer", _WITHOUT_EFFECT),
    _field(
        "concurrency_limit",
        "integer",
        "POSTs that are under way at once for each destination: one, or with -1, unlimited in Kong's queue,"
        " up to four. For a metering API that is far away and a gateway that serves thousands of requests a"
        " second.",
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
            "err": "must be an http or https URL, without credentials and query",
        },
        required=True,
        referenceable=True,
    ),
    # Not required as in Kong's plugin: a self-hosted OpenMeter may well have no token.
    _field(
        "api_token",
        "string",
        "The bearer token for the endpoint. A self-hosted OpenMeter may need none.",
        referenceable=True,
        encrypted=True,
    ),
    _field("meter_api_requests", "boolean", "One event `kong.api_request` for each request.", default=True),
    _field(
        "meter_ai_token_usage",
        "boolean",
        "Events `kong.llm_request` for the input and output tokens that an AI plugin logged.",
        default=True,
    ),
    _record(
        "subject",
        "Whom a request is billed to: the first place that names somebody.",
        _SUBJECT,
        entity_checks=[*_LOOKUP_CHECKS, _required_where("missing", ["fallback"], "fallback_subject")],
    ),
    _array("attributes", "What else of a request goes into the data of its events.", _ATTRIBUTE),
    _field("ssl_verify", "boolean", "Whether the endpoint's certificate is verified.", default=True),
    _field("timeout", "number", "Milliseconds for a POST to be answered.", default=10_000, gt=0),
    _field(
        "keepalive",
        "number",
        "Milliseconds that an idle connection to the endpoint is kept open.",
        default=60_000,
        between=[0, 1_000_000_000],
    ),
    _record("queue", "How events are batched and retried.", _QUEUE),
    # Below: what Kong's plugin does not have.
    _field(
        "source",
        "string",
        "The events' `source`: the same on all nodes of a cluster, since source and id name an event.",
        default="kong",
        len_min=1,
        len_max=256,
    ),
    _field(
        "meter_anonymous_consumer",
        "boolean",
        "Whether an authentication plugin's `anonymous` consumer is billed like any other.",
        default=False,
    ),
    _field(
        "application_context",
        "string",
        "When Kong is asked for the Dev Portal application, which costs it a round trip: where the subject"
        " depends on it, `always` (then `application_id` is also beside a consumer), or `never`.",
        default="when_needed",
        one_of=["when_needed", "always", "never"],
    ),
    _record(
        "filters",
        "Which requests are metered: those that are in every list that is given. An excluded request has"
        " no event at all, neither for itself nor for its tokens, and is counted by the list it is not in.",
        _FILTERS,
    ),
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


# MERGED: The plugin's schema as Lua, for a control plane that cannot ask the plugin server, as Konnect's.
#
# Konnect wants one file that requires nothing, so what Kong's `typedefs` would say is written out.

_PROTOCOLS: Final = ["grpc", "grpcs", "http", "https"]

_WIDTH: Final = 100


def schema() -> Field:
    """Return the whole schema: a plugin server's is given its protocols by Kong, this one must have them.

    It says nothing of consumers: the plugin may be scoped to one, as to a route or a service.
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
    """Return the schema as a Lua chunk that returns it."""
    return (
        f"-- The schema of the plugin {NAME} {VERSION}, for Konnect. Made by `openmeter-plugin schema-lua`.\n"
        f"return {_lua(schema())}\n"
    )


def _lua(value: Any, indent: str = "") -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    inner = f"{indent}  "
    if isinstance(value, dict):
        items = [f"{name} = {_lua(member, inner)}" for name, member in value.items()]
    else:
        items = [_lua(item, inner) for item in value]
    flat = "{ " + ", ".join(items) + " }" if items else "{}"
    if len(indent) + len(flat) <= _WIDTH and "\n" not in flat:
        return flat
    return "{\n" + "".join(f"{inner}{item},\n" for item in items) + f"{indent}}}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
