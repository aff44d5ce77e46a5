"""Checks of `syncd doctor` as pure functions from values to findings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from openmeter_plugin.network.proxies import is_nearby
from openmeter_plugin.units import plural
from syncd.audit.books import address_of, leads_to
from syncd.gateways.models import Gate, Spool, SpoolPart
from syncd.http.endpoint import Endpoint
from syncd.metering.base import Meter
from syncd.metering.meters import STANDARD_METERS
from syncd.metering.usage import EVENTS_METER

METERING_PLUGIN = "openmeter"
OTHER_METERING = frozenset(
    {"metering-and-billing", "konnect-application-metering", "moesif", "amberflo", "stripe-metering"}
)
"""Plugins that bill the same requests, by name or the start of a name."""
MAX_SKEW = timedelta(seconds=30)
MAX_WAIT = timedelta(minutes=5)
"""An event that waits longer was not just sent: its delivery fails."""


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
        """Return it as in ``syncd doctor --output json``."""
        return {"check": self.check, "level": str(self.level), "text": self.text}


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of a Kong; `where` is the name of that Kong in messages.

    `consumer`: id, username or custom_id of its only consumer. `is_of_a_group`: only for consumers of a
    group. `is_partial`: only for one service or route. `entities` are what it is bound to, in words, none for
    a global one. `unread` is the name of a configuration that is kept elsewhere.
    """

    name: str
    enabled: bool
    config: Mapping[str, object]
    where: str
    consumer: str | None = None
    is_of_a_group: bool = False
    is_partial: bool = False
    entities: tuple[str, ...] = ()
    unread: str | None = None

    @property
    def place(self) -> str:
        """Return which instance this is: its Kong, and what it is bound to there."""
        return f"{self.where}, {f'plugin of {_and(self.entities)}' if self.entities else 'global plugin'}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def check_plugins(
    plugins: Iterable[Plugin], subject_field: str, metering_url: str, metering_hosts: Collection[str] = ()
) -> Iterator[Finding]:
    """Check that plugin and syncd agree, and that nothing else meters the same requests.

    `metering_hosts` are other names of the metering API's host, as gateways know it.
    """
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
        if plugin.unread is not None:
            text = (
                f"{plugin.place}: its configuration is {plugin.unread!r}, which this file does not contain,"
                " so its subject and its endpoint are unknown. Compare them by hand"
            )
            yield Finding("plugin", Level.WARNING, text)
            continue
        yield from _subject_agreement(plugin, subject_field)
        yield _endpoint_agreement(plugin, metering_url, metering_hosts)
    for plugin in enabled:
        if any(plugin.name.startswith(other) for other in OTHER_METERING):
            text = (
                f"{plugin.place}: {plugin.name} is enabled next to {METERING_PLUGIN}: the same requests are"
                " billed twice. Disable one of them"
            )
            level = Level.PROBLEM if metering else Level.WARNING
            yield Finding("double billing", level, text)
    yield from _inputs(metering, [plugin for plugin in enabled if _posts_to_us(plugin)])


RECEIVER_HEADER = "x-metering-key"
"""The header by which http-log identifies itself to `openmeter-plugin serve --http-log`."""


def _posts_to_us(plugin: Plugin) -> bool:
    """Return whether this is an http-log that posts to the plugin's receiver, as far as its header shows."""
    headers = plugin.config.get("headers")
    named = isinstance(headers, dict) and RECEIVER_HEADER in {str(name).lower() for name in headers}
    return plugin.name == "http-log" and named


def _inputs(metering: Sequence[Plugin], receivers: Sequence[Plugin]) -> Iterator[Finding]:
    """Tell which Kong hands requests over by http-log, and where two inputs meter the same requests."""
    for plugin in receivers:
        yield Finding("input", Level.OK, f"{plugin.place}: http-log hands requests over")
    for plugin in metering:
        for other in receivers:
            if plugin.where == other.where and _may_meet(plugin, other):
                text = (
                    f"{plugin.place} and {other.place}: {METERING_PLUGIN} and http-log hand the same requests"
                    " over. The metering API counts them once, the books of the gateway twice. Disable one"
                )
                yield Finding("double metering", Level.WARNING, text)


def _may_meet(one: Plugin, other: Plugin) -> bool:
    """Return whether a request can pass both: they are not bound to different entities of one kind."""
    bound = dict(entity.split(" ", 1) for entity in one.entities)
    also = dict(entity.split(" ", 1) for entity in other.entities)
    return all(also.get(kind, name) == name for kind, name in bound.items())


def _subject_agreement(plugin: Plugin, subject_field: str) -> Iterator[Finding]:
    subject = plugin.config.get("subject")
    fields = subject if isinstance(subject, dict) else {}
    field = fields.get("field") or "id"
    place = fields.get("look_up_value_in") or "consumer"
    if place == "application":
        text = f"{plugin.place}: the plugin looks for a Dev Portal application first"
        yield Finding("subject", Level.OK, text)
    elif place != "consumer":
        text = (
            f"{plugin.place}: the plugin takes its subjects from {place}, which syncd does not map. List them"
            " as static subjects"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field == subject_field == "tag":
        text = f"{plugin.place}: the plugin sends the customer's key as subject, which needs no attachment"
        yield Finding("subject", Level.OK, text)
    elif field == "tag":
        text = (
            f"{plugin.place}: the plugin sends the customer key in a consumer's tag as subject, but"
            f" mapping.subject_field is {subject_field!r}: syncd attaches subjects without usage, and reports"
            " others as blocked although their usage is attributed. Set mapping.subject_field to tag"
        )
        yield Finding("subject", Level.WARNING, text)
    elif field != subject_field:
        text = (
            f"{plugin.place}: the plugin sends subject.field {field!r}, but mapping.subject_field is"
            f" {subject_field!r}: no usage reaches its customer. Set both to the same field"
        )
        yield Finding("subject", Level.PROBLEM, text)
    else:
        yield Finding("subject", Level.OK, f"{plugin.place}: plugin and syncd both use {field} as subject")


def _endpoint_agreement(plugin: Plugin, metering_url: str, metering_hosts: Collection[str]) -> Finding:
    endpoint = str(plugin.config.get("ingest_endpoint") or "")
    here = address_of(endpoint)
    if here is None:
        given = f"is {endpoint!r}, which is no URL" if endpoint else "is not there"
        text = (
            f"{plugin.place}: its ingest_endpoint {given}, so where its events go is unknown. Compare it with"
            " metering.url by hand"
        )
        return Finding("endpoint", Level.WARNING, text)
    if leads_to(endpoint, metering_url, metering_hosts):
        text = f"{plugin.place}: events go to {here}, the server of the customers"
        return Finding("endpoint", Level.OK, text)
    text = (
        f"{plugin.place}: events go to {here}, but customers are at {address_of(metering_url)}"
        " (metering.url). Unless these are two names of one server, no usage is ever attributed"
    )
    return Finding("endpoint", Level.WARNING, text)


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


def check_proxy(name: str, endpoint: Endpoint) -> Finding:
    """Say which way the requests to an API take: a proxy that is not meant for it sees its token."""
    proxy = endpoint.resolved_proxy()
    if proxy is not None:
        way = f"through the proxy {proxy.url} ({proxy.setting})"
    elif endpoint.unix_socket:
        way = "directly, by a Unix socket"
    elif is_nearby(endpoint.parsed_url().host):
        way = "directly: loopback and link-local addresses never pass a proxy"
    else:
        way = "directly: no setting and no variable names a proxy for it"
    return Finding("proxy", Level.OK, f"{name}: requests go {way}")


def check_gateway(name: str, problems: Iterable[str], leads_here: bool, spool: Spool) -> Iterator[Finding]:
    """Check that a gateway's plugin is ready, sends its events to this metering API, and holds none back."""
    if reasons := "; ".join(problems):
        yield Finding("gateway", Level.PROBLEM, f"{name}: its plugin is not ready: {reasons}")
        return
    found = [Finding("gateway", Level.WARNING, f"{name}: {text}") for text in _held_back(leads_here, spool)]
    if found:
        yield from found
    else:
        text = f"{name}: ready, and the token is valid; {_waiting(spool.total)}"
        yield Finding("gateway", Level.OK, text)


_AI_GAPS = {
    "ai_statistics_off": (
        "an AI plugin answered but logged no tokens, so they are not billed. Set logging.log_statistics: true"
        " on it"
    ),
    "ai_output_unknown": (
        "Kong logged no output tokens of a stream, so they are not billed. Update Kong to 3.13 or later, or"
        " set response_streaming: deny"
    ),
    "ai_usage_estimated": (
        "Kong estimated the tokens of a stream from its characters. Update Kong to 3.13 or later, or set"
        " response_streaming: deny"
    ),
}


def _held_back(leads_here: bool, spool: Spool) -> Iterator[str]:
    if not leads_here:
        yield (
            "none of its events go to metering.url, so `syncd audit` leaves it out. This is normal before the"
            " first metered request. If that server has another name there, add it to metering_hosts"
        )
    if spool.dead_letters:
        yield (
            f"{plural(spool.dead_letters, 'event was', 'events were')} refused by the metering API and not"
            " billed. To see why, run `openmeter-plugin spool dead-letters` there"
        )
    if spool.quarantined:
        yield (
            f"{plural(spool.quarantined, 'request is', 'requests are')} in quarantine and not billed, because"
            " it is unknown who pays. Correct subject in the plugin's configuration, then run"
            " `openmeter-plugin spool replay --quarantine` there"
        )
    books = spool.total.books
    for what, lost in (("request", books.lost), ("event", books.lost_events)):
        if number := sum(lost.values()):
            yield (
                f"{plural(number, what)} lost on its disk since its spool was created, and not billed"
                f" ({', '.join(sorted(reason for reason, count in lost.items() if count))}): docs/runbook.md,"
                ' "Usage is lost"'
            )
    for gap, number in books.ai_usage_gaps.items():
        if number:
            what = _AI_GAPS.get(gap, "Kong could not tell their AI usage")
            yield f"{plural(number, 'request')} since its spool was created ({gap}): {what}"
    oldest = spool.total.oldest_waiting
    if oldest is not None and oldest.age_seconds > MAX_WAIT.total_seconds():
        yield (
            f"{_waiting(spool.total)}, so they are not billed yet. Its log says why the delivery fails"
            " (docs/runbook.md)"
        )


def _waiting(part: SpoolPart) -> str:
    if part.oldest_waiting is None:
        return "no event waits for its delivery"
    age = timedelta(seconds=round(part.oldest_waiting.age_seconds))
    waiting = plural(part.backlog, "event waits for its delivery", "events wait for their delivery")
    return f"{waiting}, the oldest for {age}"


def summary(findings: Iterable[Finding]) -> str:
    """Return how many findings of each level there are, in one sentence."""
    levels = Counter(finding.level for finding in findings)
    problems, warnings, fine = levels[Level.PROBLEM], levels[Level.WARNING], levels[Level.OK]
    if not problems and not warnings:
        return f"All {fine} checks are ok."
    return f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}, {fine} ok."


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


def check_empty(source: str, principals: int, *, may_be_empty: bool = False) -> Finding:
    """Check that a source returns principals."""
    if principals or may_be_empty:
        return Finding("source", Level.OK, f"{source}: {plural(principals, 'principal')}")
    text = f"{source} returns no principals; while it is empty, nothing is removed (may_be_empty)"
    return Finding("source", Level.WARNING, text)


GATE = "gate"
_REFUSED = frozenset({"401", "403"})
_MAX_SILENCE = 60.0
"""Seconds without an answer of the metering API after which a gate with active subjects is blind."""


def check_gate(name: str, gate: Gate) -> Iterator[Finding]:
    """Check a gateway's gate; one finding that is ok if nothing is wrong."""
    found = [*_gate_metering(name, gate), *_gate_features(name, gate), *_gate_kongs(name, gate)]
    if found:
        yield from found
        return
    text = f"{name}: the gate is in mode {gate.mode} for {plural(gate.subjects, 'subject')}"
    if not gate.figures.calls:
        text += "; none has been active yet, so its token was not used"
    yield Finding(GATE, Level.OK, text)


def _gate_metering(name: str, gate: Gate) -> Iterator[Finding]:
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for call, outcome, count in gate.figures.calls:
        outcomes[call][outcome] += count
    refused = [call for call, by in outcomes.items() if by.keys() & _REFUSED and not by["200"]]
    if refused:
        text = (
            f"{name}: the metering API refuses the gate's token ({', '.join(sorted(refused))}), so it limits"
            " nobody. Give the token the right to read entitlements (on Konnect the role Entitlement Access):"
            " metering.token_file in the gate's file, or OPENMETER_GATE_TOKEN"
        )
        yield Finding(GATE, Level.PROBLEM, text)
    elif outcomes and (gate.figures.answer_age is None or gate.figures.answer_age > _MAX_SILENCE):
        age = gate.figures.answer_age
        since = "has not answered the gate" if age is None else f"has not answered the gate for {age:.0f} s"
        last = f" ({gate.last_error})" if gate.last_error else ""
        text = f'{name}: the metering API {since}{last}: docs/runbook.md, "The gate is blind"'
        yield Finding(GATE, Level.PROBLEM, text)


def _gate_features(name: str, gate: Gate) -> Iterator[Finding]:
    would = "are stopped" if gate.mode == "enforce" else "would be stopped in mode enforce"
    for feature, reason, number in gate.denied_counts:
        if reason == "FEATURE_NOT_FOUND":
            text = (
                f"{name}: the metering API has no feature {feature}, so all requests that need it {would}."
                " Create it there, or correct features in the gate's file"
            )
            yield Finding(GATE, Level.PROBLEM, text)
        elif reason == "FEATURE_UNAVAILABLE":
            text = (
                f"{name}: {plural(number, 'active customer')} without an entitlement to {feature}: their"
                f" requests {would}. Give them one, or let no rule of the gate name this feature"
            )
            yield Finding(GATE, Level.WARNING, text)


def _gate_kongs(name: str, gate: Gate) -> Iterator[Finding]:
    if not gate.figures.kongs and gate.mode != "off":
        text = (
            f"{name}: no Kong asks this gate, so it stops nothing. Enable the plugin openmeter-gate, or the"
            " post-function of `openmeter-plugin gate lua`, and let Kong's workers open the gate's socket:"
            " docs/gate.md"
        )
        yield Finding(GATE, Level.WARNING, text)
    for kong in gate.figures.kongs:
        if kong.lua and kong.lua != gate.version:
            text = (
                f"{name}: the gate is of version {gate.version}, its Lua half in Kong of {kong.lua}. Write"
                " the files again with `openmeter-plugin files` (or the text of `openmeter-plugin gate lua`),"
                " and restart Kong"
            )
            yield Finding(GATE, Level.WARNING, text)
        if kong.no_memory:
            text = (
                f"{name}: Kong's shared dict openmeter_gate is full, so customers without a place in it are"
                " not limited. Make it larger and restart Kong"
            )
            yield Finding(GATE, Level.WARNING, text)
        if kong.errors:
            text = (
                f"{name}: {plural(kong.errors, 'fault')} in the gate's Lua half, each of which let a request"
                " pass. Kong's error log has them"
            )
            yield Finding(GATE, Level.WARNING, text)
