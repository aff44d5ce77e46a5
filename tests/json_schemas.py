"""JSON Schemas of both configuration files, for editors: docs/schemas.

`python -m tests.json_schemas` writes them; tests hold that they are up to date. syncd's is made of the models
that check its settings, the plugin's of what Kong is told of each setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.http_log.config import HttpLogSettings
from syncd.config.settings import Config

FOLDER: Final = Path(__file__).parents[1] / "docs" / "schemas"
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def of_syncd() -> Schema:
    """Return the schema of syncd.yaml; a setting that the environment may give is not required."""
    schema = _walked(Config.model_json_schema(), _without_noise)
    return {"$schema": _DIALECT, **schema, "title": "syncd.yaml"}


def _without_noise(schema: Schema) -> None:
    """Drop titles, and what is required but for the type of a source and the key of a static subject."""
    schema.pop("title", None)
    if "required" in schema:
        kept = [name for name in schema["required"] if name in ("type", "key", "subjects")]
        schema.pop("required")
        schema |= {"required": kept} if kept else {}
    if schema.get("format") in {"password", "path"}:
        schema.pop("format")
        schema.pop("writeOnly", None)


def of_the_plugin() -> Schema:
    """Return the schema of openmeter-plugin.yaml: the settings of Kong's plugin, and `http_log`."""
    schema = _record(FIELDS)
    http_log = _walked(HttpLogSettings.model_json_schema(), _without_noise)
    texts: Schema = {"type": "string"}
    http_log["properties"]["secret"] = {"anyOf": [texts, {"type": "array", "items": texts}]}
    http_log["properties"]["max_body"] = {"type": ["integer", "string"], "examples": ["16MiB"]}
    schema["properties"]["http_log"] = http_log
    # api_token may come from the environment, and nothing else is needed in the file of every deployment.
    schema["required"] = ["ingest_endpoint"]
    return {"$schema": _DIALECT, **schema, "title": "openmeter-plugin.yaml"}


def _record(fields: list[dict[str, Any]]) -> Schema:
    properties = {name: _field(described) for field in fields for name, described in field.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _field(described: dict[str, Any]) -> Schema:
    kind = described["type"]
    schema: Schema = {"type": kind}
    match kind:
        case "record":
            schema = _record(described["fields"])
        case "array" | "set":
            schema = {"type": "array", "items": _field(described["elements"])}
        case "map":
            schema = {"type": "object", "additionalProperties": _field(described["values"])}
    if "one_of" in described:
        schema["enum"] = described["one_of"]
    if "between" in described:
        schema["minimum"], schema["maximum"] = described["between"]
    if "gt" in described:
        schema["exclusiveMinimum"] = described["gt"]
    if "len_min" in described:
        schema["minItems" if schema["type"] == "array" else "minLength"] = described["len_min"]
    if "default" in described:
        schema["default"] = described["default"]
    if "description" in described:
        schema["description"] = described["description"]
    return schema


def _walked(schema: Schema, change: Callable[[Schema], None]) -> Schema:
    """Apply a change to a schema and all schemas within it."""
    inner = [schema.get(name, {}).values() for name in ("properties", "$defs")]
    lists = [schema.get(name, ()) for name in ("anyOf", "oneOf")]
    for part in (*(one for group in inner for one in group), *(one for group in lists for one in group)):
        _walked(part, change)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _walked(schema[name], change)
    change(schema)
    return schema


SCHEMAS: Final = {"syncd.json": of_syncd, "openmeter-plugin.json": of_the_plugin}


def text(name: str) -> str:
    """Return the content of a schema's file."""
    return json.dumps(SCHEMAS[name](), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in SCHEMAS:
        (FOLDER / name).write_text(text(name))
