"""The plugin's schema as Lua, for a control plane that cannot ask the plugin server, as Konnect's.

Konnect wants one file that requires nothing, so what Kong's `typedefs` would say is written out.
"""

from __future__ import annotations

from typing import Any, Final

from openmeter_plugin.schema import FIELDS, NAME, VERSION, Field

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
