"""Which plugins the Kongs of the sources have: read from Admin APIs, Konnect control planes and files."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import yaml

from syncd.config import Config
from syncd.doctor_checks import Finding, Level, Plugin, check_plugins
from syncd.errors import ApiError
from syncd.http import ApiClient, Endpoint, expect_list, expect_object
from syncd.retry import Retry
from syncd.source_config import DeclarativeFileSource, KongAdminSource, KonnectConsumersSource
from syncd.wiring import CONSUMERS, kong_endpoint, konnect_endpoint

_PAGE = 1000


def plugins(config: Config) -> Iterator[Finding]:
    """Yield whether plugin and syncd agree, in all Kongs that syncd reads."""
    found: list[Plugin] = []
    readable = False
    for index, source in enumerate(config.sources):
        try:
            match source:
                case KongAdminSource():
                    readable = True
                    prefix = f"/{quote(source.workspace, safe='')}" if source.workspace else ""
                    where = f"Kong at {source.url}"
                    found += _listed(kong_endpoint(source, index), prefix, where, config.metering.attempts)
                case KonnectConsumersSource():
                    readable = True
                    plane = quote(source.control_plane_id, safe="")
                    prefix = f"/v2/control-planes/{plane}/core-entities"
                    where = f"control plane {source.control_plane_id}"
                    endpoint = konnect_endpoint(source, index, CONSUMERS)
                    found += _listed(endpoint, prefix, where, config.metering.attempts)
                case DeclarativeFileSource():
                    readable = True
                    found += _of_file(source)
        except (ApiError, OSError, yaml.YAMLError) as error:
            yield Finding("plugin", Level.PROBLEM, f"sources[{index}]: its plugins cannot be read: {error}")
    if readable:
        yield from check_plugins(found, config.mapping.subject_field, config.metering.url)
    else:
        text = "no source tells which plugins Kong has; compare subject.field and ingest_endpoint by hand"
        yield Finding("plugin", Level.WARNING, text)


def _listed(endpoint: Endpoint, prefix: str, where: str, attempts: int) -> Iterator[Plugin]:
    """Yield the plugins of a list that Kong pages, to its end."""
    with ApiClient(endpoint, Retry(attempts=attempts)) as client:
        offset: str | None = None
        while True:
            query: dict[str, str | int | list[str]] = {"size": _PAGE}
            if offset:
                query["offset"] = offset
            page = expect_object(client.get(f"{prefix}/plugins", query), where, "/plugins")
            data = page.get("data")
            for item in expect_list([] if data == {} else data, where, "data of /plugins"):
                yield _plugin(expect_object(item, where, "a plugin"), where)
            following = page.get("offset")
            if not isinstance(following, str) or following == offset:
                return
            offset = following


def _of_file(source: DeclarativeFileSource) -> Iterator[Plugin]:
    def walk(node: object) -> Iterator[Plugin]:
        if isinstance(node, dict):
            listed = node.get("plugins")
            for item in listed if isinstance(listed, list) else ():
                if isinstance(item, dict):
                    yield _plugin(item, str(source.path.name))
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    yield from walk(yaml.safe_load(source.path.read_bytes()))


def _plugin(item: dict[str, object], where: str) -> Plugin:
    config = item.get("config")
    enabled = item.get("enabled") is not False
    return Plugin(str(item.get("name")), enabled, config if isinstance(config, dict) else {}, where)
