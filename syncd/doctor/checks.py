"""What `syncd doctor` looks for: pure functions from what was read to findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from urllib.parse import urlsplit

from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER

OUR_PLUGIN = "openmeter"
OTHER_METERING = frozenset(
    {"metering-and-billing", "konnect-application-metering", "moesif", "amberflo", "stripe-metering"}
)
"""Plugins that bill the same requests; names that begin with one of these count too."""
MAX_SKEW = timedelta(seconds=30)

_METERS = {
    REQUESTS_METER: ("kong.api_request", "COUNT"),
    TOKENS_METER: ("kong.llm_request", "SUM"),
}


_COUNTED = ("kong.llm_request", "COUNT")


class Level(StrEnum):
    """How bad it is; only a problem makes `syncd doctor` end with 1."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; where it is not ok, the text says what to do."""

    check: str
    level: Level
    text: str

    def to_json(self) -> dict[str, str]:
        """Return it as in ``syncd doctor --json``."""
        return {"check": self.check, "level": str(self.level), "text": self.text}


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin as Kong has it; `where` says in which Kong.

    `consumer`: it is for this one only, by id, username or custom_id. `is_of_a_group`: only for consumers of
    some group. `is_partial`: only for one service or route.
    """

    name: str
    enabled: bool
    config: Mapping[str, object]
    where: str
    consumer: str | None = None
    is_of_a_group: bool = False
    is_partial: bool = False


def check_plugins(plugins: Iterable[Plugin], subject_field: str, metering_url: str) -> Iterator[Finding]:
    """Yield whether plugin and syncd agree, and whether something else meters the same requests."""
    enabled = [plugin for plugin in plugins if plugin.enabled]
    ours = [plugin for plugin in enabled if plugin.name == OUR_PLUGIN]
    if not ours:
        text = (
            f"no plugin {OUR_PLUGIN} is enabled in any Kong that syncd reads: nothing is metered there,"
            " unless its http-log posts to `openmeter-plugin serve --http-log`: compare its file by hand"
        )
        yield Finding("plugin", Level.WARNING, text)
    for plugin in ours:
        yield from _agreement(plugin, subject_field, metering_url)
    for plugin in enabled:
        if any(plugin.name.startswith(other) for other in OTHER_METERING):
            text = (
                f"{plugin.where}: {plugin.name} is enabled beside {OUR_PLUGIN}: the same requests are billed"
                " twice. Disable one of them"
            )
            level = Level.PROBLEM if ours else Level.WARNING
            yield Finding("double billing", level, text)


def _agreement(plugin: Plugin, subject_field: str, metering_url: str) -> Iterator[Finding]:
    subject = plugin.config.get("subject")
    fields = subject if isinstance(subject, dict) else {}
    field = fields.get("field") or "id"
    place = fields.get("look_up_value_in") or "consumer"
    if place == "application":
        text = f"{plugin.where}: the plugin looks for a Dev Portal application first"
        yield Finding("subject", Level.OK, text)
    elif place != "consumer":
        text = (
            f"{plugin.where}: the plugin looks its subjects up in {place}, which syncd does not map; name"
            " them as static subjects"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field == subject_field == "tag":
        text = f"{plugin.where}: the plugin sends the customer's key as subject, which needs no attachment"
        yield Finding("subject", Level.OK, text)
    elif field == "tag":
        text = (
            f"{plugin.where}: the plugin sends the key of a consumer's tag as subject, but"
            f" mapping.subject_field is {subject_field!r}: syncd attaches subjects that nobody sends, and"
            " calls blocked what is not. Set it to tag"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field != subject_field:
        text = (
            f"{plugin.where}: the plugin sends subject.field {field!r}, but mapping.subject_field is"
            f" {subject_field!r}: no usage meets its customer. Make them the same"
        )
        yield Finding("subject", Level.PROBLEM, text)
    else:
        yield Finding("subject", Level.OK, f"{plugin.where}: plugin and syncd name subjects by {field}")
    endpoint = str(plugin.config.get("ingest_endpoint") or "")
    host, ours = urlsplit(endpoint).hostname, urlsplit(metering_url).hostname
    if host == ours:
        yield Finding("endpoint", Level.OK, f"{plugin.where}: events go to {host}, where customers are kept")
    else:
        text = (
            f"{plugin.where}: events go to {host}, but customers are kept at {ours} (metering.url)."
            " Right where both names lead to one server; else nothing is ever attributed"
        )
        yield Finding("endpoint", Level.WARNING, text)


def check_meters(meters: Mapping[str, tuple[str, str]]) -> Iterator[Finding]:
    """Yield whether the standard meters are there; `meters` is key -> event type and aggregation."""
    for key, (event_type, aggregation) in _METERS.items():
        found = meters.get(key)
        if found is None:
            text = f"meter {key} is missing, so its usage is invisible. `syncd meters apply` creates it"
            yield Finding("meter", Level.PROBLEM, text)
        elif (found[0], found[1].upper()) != (event_type, aggregation):
            text = (
                f"meter {key} is {found[1]} of {found[0]}, and must be {aggregation} of {event_type}:"
                " what it shows is wrong. Delete it and create it anew"
            )
            yield Finding("meter", Level.PROBLEM, text)
        else:
            yield Finding("meter", Level.OK, f"meter {key}: {aggregation} of {event_type}")
    counting = [key for key, (kind, how) in meters.items() if (kind, how.upper()) == _COUNTED]
    if counting:
        key = min(counting, key=lambda one: (one != EVENTS_METER, one))
        yield Finding("meter", Level.OK, f"meter {key}: COUNT of {_COUNTED[0]}")
    else:
        text = (
            f"no meter counts {_COUNTED[0]} events ({EVENTS_METER}), so `syncd audit` compares them only"
            " roughly. `syncd meters apply` creates it"
        )
        yield Finding("meter", Level.WARNING, text)


def check_gateway(name: str, problems: Iterable[str], leads_here: bool, dead_letters: int) -> Finding:
    """Tell whether a gateway's plugin can do its work, and sends its events to this metering API."""
    if said := "; ".join(problems):
        return Finding("gateway", Level.PROBLEM, f"{name}: its plugin is not ready: {said}")
    if not leads_here:
        text = (
            f"{name}: none of its events go to metering.url, so `syncd audit` leaves it out. Right where"
            " nothing was metered yet; if that server has another name there, list it in metering_hosts"
        )
        return Finding("gateway", Level.WARNING, text)
    if dead_letters:
        text = (
            f"{name}: {dead_letters} events were refused by the metering API and are billed to nobody:"
            " `openmeter-plugin spool dead-letters` there tells why"
        )
        return Finding("gateway", Level.WARNING, text)
    return Finding("gateway", Level.OK, f"{name}: ready, and its token is right")


def check_clock(server: datetime | None, ours: datetime) -> Finding:
    """Tell whether this machine's clock goes with the metering API's."""
    if server is None:
        return Finding("clock", Level.WARNING, "the metering API sends no Date header to compare with")
    skew = ours - server
    seconds = f"{abs(skew).total_seconds():.0f} s {'ahead of' if skew > timedelta(0) else 'behind'}"
    if abs(skew) > MAX_SKEW:
        text = (
            f"this machine's clock is {seconds} the metering API's: events get the wrong hour, grace periods"
            " the wrong end. Set it by NTP"
        )
        return Finding("clock", Level.PROBLEM, text)
    return Finding("clock", Level.OK, f"this machine's clock is {seconds} the metering API's")


def check_empty(source: str, principals: int) -> Finding:
    """Tell whether a source names anybody."""
    if principals:
        return Finding("source", Level.OK, f"{source}: {principals} principals")
    text = f"{source} names nobody; while it is empty, nothing is removed (--allow-empty)"
    return Finding("source", Level.WARNING, text)
