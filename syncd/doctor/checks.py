"""Checks of `syncd doctor` as pure functions from values to findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from urllib.parse import urlsplit

from syncd.metering.base import Meter
from syncd.metering.meters import STANDARD_METERS
from syncd.metering.usage import EVENTS_METER

METERING_PLUGIN = "openmeter"
OTHER_METERING = frozenset(
    {"metering-and-billing", "konnect-application-metering", "moesif", "amberflo", "stripe-metering"}
)
"""Plugins that bill the same requests, by name or the start of a name."""
MAX_SKEW = timedelta(seconds=30)


class Level(StrEnum):
    """Severity of a finding; only a problem makes `syncd doctor` exit with 1."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; unless it is ok, the text says what to do."""

    check: str
    level: Level
    text: str

    def to_json(self) -> dict[str, str]:
        """Return it as in ``syncd doctor --json``."""
        return {"check": self.check, "level": str(self.level), "text": self.text}


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of a Kong; `where` is the name of that Kong in messages.

    `consumer`: id, username or custom_id of its only consumer. `is_of_a_group`: only for consumers of a
    group. `is_partial`: only for one service or route.
    """

    name: str
    enabled: bool
    config: Mapping[str, object]
    where: str
    consumer: str | None = None
    is_of_a_group: bool = False
    is_partial: bool = False


def check_plugins(plugins: Iterable[Plugin], subject_field: str, metering_url: str) -> Iterator[Finding]:
    """Check that plugin and syncd agree, and that nothing else meters the same requests."""
    enabled = [plugin for plugin in plugins if plugin.enabled]
    metering = [plugin for plugin in enabled if plugin.name == METERING_PLUGIN]
    if not metering:
        text = (
            f"no plugin {METERING_PLUGIN} is enabled in any Kong that syncd reads: nothing is metered there,"
            " unless its http-log plugin posts to `openmeter-plugin serve --http-log`. In that case, compare"
            " that server's configuration file by hand"
        )
        yield Finding("plugin", Level.WARNING, text)
    for plugin in metering:
        yield from _agreement(plugin, subject_field, metering_url)
    for plugin in enabled:
        if any(plugin.name.startswith(other) for other in OTHER_METERING):
            text = (
                f"{plugin.where}: {plugin.name} is enabled next to {METERING_PLUGIN}: the same requests are"
                " billed twice. Disable one of them"
            )
            level = Level.PROBLEM if metering else Level.WARNING
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
            f"{plugin.where}: the plugin takes its subjects from {place}, which syncd does not map. List them"
            " as static subjects"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field == subject_field == "tag":
        text = f"{plugin.where}: the plugin sends the customer's key as subject, which needs no attachment"
        yield Finding("subject", Level.OK, text)
    elif field == "tag":
        text = (
            f"{plugin.where}: the plugin sends the customer key in a consumer's tag as subject, but"
            f" mapping.subject_field is {subject_field!r}: syncd attaches subjects without usage, and reports"
            " others as blocked although their usage is attributed. Set mapping.subject_field to tag"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field != subject_field:
        text = (
            f"{plugin.where}: the plugin sends subject.field {field!r}, but mapping.subject_field is"
            f" {subject_field!r}: no usage reaches its customer. Set both to the same field"
        )
        yield Finding("subject", Level.PROBLEM, text)
    else:
        yield Finding("subject", Level.OK, f"{plugin.where}: plugin and syncd both use {field} as subject")
    endpoint = str(plugin.config.get("ingest_endpoint") or "")
    host, metering_host = urlsplit(endpoint).hostname, urlsplit(metering_url).hostname
    if host == metering_host:
        yield Finding(
            "endpoint", Level.OK, f"{plugin.where}: events go to {host}, the server of the customers"
        )
    else:
        text = (
            f"{plugin.where}: events go to {host}, but customers are at {metering_host} (metering.url)."
            " Unless these are two names of one server, no usage is ever attributed"
        )
        yield Finding("endpoint", Level.WARNING, text)


def check_meters(meters: Mapping[str, Meter]) -> Iterator[Finding]:
    """Check the standard meters, as `syncd meters apply` does; `meters` are those of the server, by key."""
    for wanted in STANDARD_METERS:
        found = meters.get(wanted.key)
        if found is not None:
            yield _compared(wanted, found)
        elif wanted.key == EVENTS_METER:
            yield _counting(wanted, meters)
        else:
            text = (
                f"meter {wanted.key} is missing, so its usage cannot be seen. `syncd meters apply` creates it"
            )
            yield Finding("meter", Level.PROBLEM, text)


def _compared(wanted: Meter, found: Meter) -> Finding:
    """Compare a standard meter with the server's; other dimensions leave its values right."""
    if problems := wanted.value_differences(found):
        text = (
            f"meter {wanted.key} differs, so its values are wrong: {'; '.join(problems)}. Delete it and"
            " create it again with `syncd meters apply`"
        )
        return Finding("meter", Level.PROBLEM, text)
    if missing := wanted.differences(found):
        text = (
            f"meter {wanted.key} differs: {'; '.join(missing)}. Its usage cannot be grouped by that. Delete"
            " it and create it again with `syncd meters apply`"
        )
        return Finding("meter", Level.WARNING, text)
    return Finding("meter", Level.OK, f"meter {wanted.key}: {_counts(wanted)}")


def _counting(wanted: Meter, meters: Mapping[str, Meter]) -> Finding:
    """Look for any other meter that counts the events of a standard meter that is missing."""
    kind = (wanted.event_type, wanted.aggregation)
    counting = [key for key, meter in meters.items() if (meter.event_type, meter.aggregation) == kind]
    if counting:
        return Finding("meter", Level.OK, f"meter {min(counting)}: {_counts(wanted)}")
    text = (
        f"no meter counts {wanted.event_type} events ({wanted.key}), so `syncd audit` compares them only"
        " roughly. `syncd meters apply` creates that meter"
    )
    return Finding("meter", Level.WARNING, text)


def _counts(meter: Meter) -> str:
    return f"{meter.aggregation.upper()} of {meter.event_type}"


def check_gateway(name: str, problems: Iterable[str], leads_here: bool, dead_letters: int) -> Finding:
    """Check that a gateway's plugin is ready and sends its events to this metering API."""
    if reasons := "; ".join(problems):
        return Finding("gateway", Level.PROBLEM, f"{name}: its plugin is not ready: {reasons}")
    if not leads_here:
        text = (
            f"{name}: none of its events go to metering.url, so `syncd audit` leaves it out. This is normal"
            " before the first metered request. If that server has another name there, add it to"
            " metering_hosts"
        )
        return Finding("gateway", Level.WARNING, text)
    if dead_letters:
        text = (
            f"{name}: {dead_letters} events were refused by the metering API and are not billed. To see"
            " why, run `openmeter-plugin spool dead-letters` there"
        )
        return Finding("gateway", Level.WARNING, text)
    return Finding("gateway", Level.OK, f"{name}: ready, and the token is valid")


def check_clock(server: datetime | None, local: datetime) -> Finding:
    """Check that this machine's clock agrees with the metering API's."""
    if server is None:
        return Finding("clock", Level.WARNING, "the metering API sends no Date header to compare with")
    skew = local - server
    seconds = f"{abs(skew).total_seconds():.0f} s {'ahead of' if skew > timedelta(0) else 'behind'}"
    if abs(skew) > MAX_SKEW:
        text = (
            f"this machine's clock is {seconds} the metering API's: events get the wrong hour, and grace"
            " periods end at the wrong time. Synchronize it with NTP"
        )
        return Finding("clock", Level.PROBLEM, text)
    return Finding("clock", Level.OK, f"this machine's clock is {seconds} the metering API's")


def check_empty(source: str, principals: int) -> Finding:
    """Check that a source returns principals."""
    if principals:
        return Finding("source", Level.OK, f"{source}: {principals} principals")
    text = f"{source} returns no principals; while it is empty, nothing is removed (--allow-empty)"
    return Finding("source", Level.WARNING, text)
