"""Reader of Kong's plugins, from Admin APIs, Konnect control planes and files, for the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from openmeter_plugin.config.lua_plugin import LUA_PRIORITY
from openmeter_plugin.config.schema import PRIORITY
from openmeter_plugin.metering.ai_usage import Version, parse_version
from syncd.config.settings import Config
from syncd.config.sources import (
    DeclarativeFileSource,
    KongAdminSource,
    KonnectConsumersSource,
    SourceConfig,
    source_names,
)
from syncd.core.errors import ApiError, ConfigError, SourceError
from syncd.core.model import Principal
from syncd.doctor.ai import check_ai
from syncd.doctor.checks import METERING_PLUGIN, Finding, Level, Plugin, check_plugins
from syncd.doctor.subjects import CHECK, Kong, check_subjects, mapped_subjects
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.runs.factory import CONSUMER_RIGHTS, kong_endpoint, konnect_endpoint, rules_of
from syncd.sources.base import offset_pages
from syncd.sources.files import DeclarativeFile, plugin_config


def check_agreement(config: Config, read: Mapping[str, Sequence[Principal]]) -> Iterator[Finding]:
    """Check that plugin and syncd agree, in all Kongs that syncd reads.

    `read` are the principals of each readable source, by its name.
    """
    kongs: list[Kong] = []
    others: dict[str, Sequence[Principal]] = {}
    unreadable = False
    named = zip(config.sources, source_names(config.sources), strict=True)
    for index, (source, name) in enumerate(named):
        try:
            found = _plugins(source, index, config.metering.attempts)
        except (ApiError, SourceError) as error:
            unreadable = True
            yield Finding("plugin", Level.PROBLEM, f"sources[{index}]: its plugins cannot be read: {error}")
            continue
        if found is None:
            others[name] = read.get(name, ())
        else:
            kongs.append(Kong(name, found, read.get(name)))
            yield from check_ai(found, _version(source, index))
            if any(plugin.enabled and plugin.name == METERING_PLUGIN for plugin in found):
                yield from _loaded(source, index)
    if not kongs and not unreadable:
        text = "no source shows Kong's plugins. Compare subject.field and ingest_endpoint by hand"
        yield Finding("plugin", Level.WARNING, text)
        return
    plugins = [plugin for kong in kongs for plugin in kong.plugins]
    hosts = {host for gateway in config.gateways for host in gateway.metering_hosts}
    yield from check_plugins(plugins, config.mapping.subject_field, config.metering.url, hosts)
    try:
        rules = rules_of(config)
    except ConfigError as error:
        yield Finding(CHECK, Level.PROBLEM, f"consumers cannot be compared: {error}")
        return
    principals = [principal for found in read.values() for principal in found]
    yield from check_subjects(kongs, others, mapped_subjects(principals, rules))


def _plugins(source: SourceConfig, index: int, attempts: int) -> tuple[Plugin, ...] | None:
    """Return the plugins of a source's Kong, None if the source has no plugins; raises errors of reading."""
    match source:
        case KongAdminSource():
            prefix = f"/{quote(source.workspace, safe='')}" if source.workspace else ""
            return tuple(_listed(kong_endpoint(source, index), prefix, f"Kong at {source.url}", attempts))
        case KonnectConsumersSource():
            prefix = f"/v2/control-planes/{quote(source.control_plane_id, safe='')}/core-entities"
            endpoint = konnect_endpoint(source, index, CONSUMER_RIGHTS)
            return tuple(_listed(endpoint, prefix, f"control plane {source.control_plane_id}", attempts))
        case DeclarativeFileSource():
            return tuple(_of_file(source))
        case _:
            return None


def _version(source: SourceConfig, index: int) -> Version | None:
    """Return the version that Kong's Admin API names in every answer, None if unknown."""
    if not isinstance(source, KongAdminSource):
        return None
    try:
        with ApiClient(kong_endpoint(source, index), Retry(attempts=1)) as client:
            return parse_version(client.header("server") or "")
    except ApiError:
        return None  # its plugins could be read a moment ago


def _loaded(source: SourceConfig, index: int) -> Iterator[Finding]:
    """Tell whether a Kong runs the plugin in Lua or calls a plugin server, if its Admin API shows it.

    The node that answers is read; a control plane's data planes load plugins of their own.
    """
    if not isinstance(source, KongAdminSource):
        return
    try:
        with ApiClient(kong_endpoint(source, index), Retry(attempts=1)) as client:
            node = client.get("/")
    except ApiError:
        return  # a token may be without this right; its plugins could be read a moment ago
    if _member(node, "configuration", "role") == "control_plane":
        return
    priority = _member(node, "plugins", "available_on_server", METERING_PLUGIN, "priority")
    ways = {
        LUA_PRIORITY: "runs in Lua and hands requests over by `openmeter-plugin serve --segments`",
        PRIORITY: "is a plugin server, which Kong calls for each request",
    }
    if isinstance(priority, int) and priority in ways:
        yield Finding("input", Level.OK, f"Kong at {source.url}: {METERING_PLUGIN} {ways[priority]}")


def _member(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _listed(endpoint: Endpoint, prefix: str, where: str, attempts: int) -> Iterator[Plugin]:
    """Yield the plugins of all pages of a list."""
    with ApiClient(endpoint, Retry(attempts=attempts)) as client:
        for item in offset_pages(client, f"{prefix}/plugins", {}, where):
            yield _plugin(item, where)


def _of_file(source: DeclarativeFileSource) -> Iterator[Plugin]:
    """Yield the plugins of a file, at its top level or nested in the entity that they are for."""
    document = DeclarativeFile(source.path).document()
    shared = document.get("_plugin_configs")
    configs = shared if isinstance(shared, dict) else {}

    def walk(node: object, parents: Mapping[str, object]) -> Iterator[Plugin]:
        if isinstance(node, dict):
            listed = node.get("plugins")
            for item in listed if isinstance(listed, list) else ():
                if isinstance(item, dict):
                    yield _plugin({**parents, **item}, str(source.path.name), configs)
            for name, value in node.items():
                for member in value if isinstance(value, list) else [value]:
                    within = {_PARENTS[name]: member} if name in _PARENTS else {}
                    outer = {} if name == "routes" else parents  # not of the whole service
                    yield from walk(member, {**outer, **within})

    yield from walk(document, {})


_PARENTS = {
    "consumers": "consumer",
    "consumer_groups": "consumer_group",
    "services": "service",
    "routes": "route",
}


def _plugin(item: Mapping[str, object], where: str, shared: Mapping[str, object] | None = None) -> Plugin:
    shared, name = shared or {}, item.get("_config")
    return Plugin(
        name=str(item.get("name")),
        enabled=item.get("enabled") is not False,
        config=plugin_config(item, shared),
        where=where,
        consumer=_reference(item.get("consumer")),
        is_of_a_group=bool(item.get("consumer_group")),
        is_partial=bool(item.get("service") or item.get("route")),
        entities=tuple(_entities(item)),
        unread=str(name) if name and not isinstance(shared.get(str(name)), dict) else None,
    )


def _entities(item: Mapping[str, object]) -> Iterator[str]:
    """Yield what a plugin is bound to: ``route orders``."""
    for kind in ("route", "service", "consumer", "consumer_group"):
        found, word = item.get(kind), kind.replace("_", " ")
        if isinstance(found, dict):
            named = (found.get(field) for field in ("name", "username", "id", "custom_id"))
            found = next((name for name in named if name), "without a name")
        if found:
            yield f"{word} {found}"


def _reference(consumer: object) -> str | None:
    """Return the id or name in a reference to a consumer.

    Kong's API has ``{"id": ...}``; a file has that, a name, or the whole consumer.
    """
    if isinstance(consumer, dict):
        consumer = consumer.get("id") or consumer.get("username") or consumer.get("custom_id")
    return str(consumer) if consumer else None
