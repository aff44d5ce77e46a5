"""Which requests are metered at all: an excluded one costs Kong no question and has no event of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openmeter_plugin.rules import Filters, SkipReason
from openmeter_plugin.values import count, table


def exclusion(log: Mapping[str, Any], filters: Filters) -> SkipReason | None:
    """Return why the request is not metered, the first reason where there are several, or None.

    What a filter asks for and the log does not tell is excluded: the filters name what is metered.
    """
    if filters.statuses is not None and _status(log) not in filters.statuses:
        return SkipReason.STATUS_EXCLUDED
    if filters.methods is not None and not _is_in(table(log.get("request")), ("method",), filters.methods):
        return SkipReason.METHOD_EXCLUDED
    if filters.routes is not None and not _is_in(table(log.get("route")), ("name", "id"), filters.routes):
        return SkipReason.ROUTE_EXCLUDED
    if filters.services is not None and not _is_in(
        table(log.get("service")), ("name", "id"), filters.services
    ):
        return SkipReason.SERVICE_EXCLUDED
    if filters.response_sources is not None and not _is_in(log, ("source",), filters.response_sources):
        return SkipReason.RESPONSE_SOURCE_EXCLUDED
    return None


def _status(log: Mapping[str, Any]) -> int | None:
    return count(table(log.get("response")).get("status"))


def _is_in(members: Mapping[str, Any], names: tuple[str, ...], wanted: frozenset[str]) -> bool:
    return any(type(value := members.get(name)) is str and value in wanted for name in names)
