"""The configured attributes of an event: what they are in one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from openmeter_plugin.metering.lenient_json import first, put, table, text
from openmeter_plugin.metering.rules import Attribute, AttributePlace

Log = Mapping[str, Any]


def attribute_values(log: Log, captures: object, attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """Return the properties of those attributes that have a value; of one property the first that has."""
    values: dict[str, Any] = {}
    for attribute in attributes:
        if attribute.property_name not in values:
            value = _READERS[attribute.place](log, captures, attribute.name)
            put(values, attribute.property_name, text(value))
    return values


def _header(log: Log, _: object, name: str) -> object:
    return first(table(table(log.get("request")).get("headers")).get(name))


def _query(log: Log, _: object, name: str) -> object:
    return first(table(table(log.get("request")).get("querystring")).get(name))


def _response_header(log: Log, _: object, name: str) -> object:
    return first(table(table(log.get("response")).get("headers")).get(name))


def _path_capture(_: Log, captures: object, name: str) -> object:
    return table(table(captures).get("named")).get(name)


def _consumer_tag(log: Log, _: object, name: str) -> object:
    """Return what stands behind `<name>:` in the first of the consumer's tags that begins with it."""
    tags = table(log.get("consumer")).get("tags")
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
