"""Values of the configured attributes in one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from openmeter_plugin.metering.lenient_json import first, json_object, put, text
from openmeter_plugin.metering.rules import Attribute, AttributePlace

Log = Mapping[str, Any]


def attribute_values(log: Log, captures: object, attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """Return the event properties that have a value; per property, the first attribute with a value wins."""
    values: dict[str, Any] = {}
    for attribute in attributes:
        if attribute.property_name not in values:
            value = _READERS[attribute.place](log, captures, attribute.name)
            put(values, attribute.property_name, text(value))
    return values


def _header(log: Log, _: object, name: str) -> object:
    return first(json_object(json_object(log.get("request")).get("headers")).get(name))


def _query(log: Log, _: object, name: str) -> object:
    return first(json_object(json_object(log.get("request")).get("querystring")).get(name))


def _response_header(log: Log, _: object, name: str) -> object:
    return first(json_object(json_object(log.get("response")).get("headers")).get(name))


def _path_capture(_: Log, captures: object, name: str) -> object:
    return json_object(json_object(captures).get("named")).get(name)


def _consumer_tag(log: Log, _: object, name: str) -> object:
    """Return the text after `<name>:` in the first of the consumer's tags that starts with it."""
    tags = json_object(log.get("consumer")).get("tags")
    prefix = f"{name}:"
    for tag in tags if type(tags) is list else ():
        if type(tag) is str and tag.startswith(prefix):
            return tag[len(prefix) :].strip()
    return None


def _constant(_: Log, __: object, value: str) -> object:
    return value


_READERS: Final[Mapping[AttributePlace, Callable[[Log, object, str], object]]] = {
    "header": _header,
    "query": _query,
    "response_header": _response_header,
    "path_capture": _path_capture,
    "consumer_tag": _consumer_tag,
    "constant": _constant,
}
