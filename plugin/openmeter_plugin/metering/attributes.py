"""Values of the configured attributes in one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from openmeter_plugin.metering.kong_log import NO_VALUE, KongLog, members
from openmeter_plugin.metering.lenient_json import first, json_object, text
from openmeter_plugin.metering.rules import Attribute, AttributePlace


def attribute_values(log: KongLog, captures: object, attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """Return the event properties that have a value; per property, the first attribute with a value wins."""
    values: dict[str, Any] = {}
    decoded: dict[AttributePlace, Mapping[str, Any]] = {}
    for attribute in attributes:
        place, name = attribute.place, attribute.name
        if attribute.property_name in values:
            continue
        if place == "constant":
            value: object = name
        elif place == "consumer_tag":
            value = _consumer_tag(log, name)
        else:
            if place not in decoded:
                decoded[place] = _MEMBERS[place](log, captures)
            value = first(decoded[place].get(name))
        usable = text(value)
        if usable is not None:
            values[attribute.property_name] = usable
    return values


def _consumer_tag(log: KongLog, name: str) -> str | None:
    """Return the text after `<name>:` in the first of the consumer's tags that starts with it."""
    tags = log.consumer.tags if log.consumer is not None else None
    prefix = f"{name}:"
    for tag in tags if type(tags) is list else ():
        if type(tag) is str and tag.startswith(prefix):
            return tag[len(prefix) :].strip()
    return None


_MEMBERS: Final[Mapping[AttributePlace, Callable[[KongLog, object], Mapping[str, Any]]]] = {
    "header": lambda log, _: members(log.request.headers if log.request else NO_VALUE),
    "query": lambda log, _: members(log.request.querystring if log.request else NO_VALUE),
    "response_header": lambda log, _: members(log.response.headers if log.response else NO_VALUE),
    "path_capture": lambda _, captures: json_object(json_object(captures).get("named")),
}
