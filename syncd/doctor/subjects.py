"""Checks that usage gets the subjects that syncd maps: those that the plugin sends, and those that arrive.

For each consumer it runs the plugin's own code, with a request that identifies nobody else: one without a
Dev Portal application, and without the headers and arguments that the plugin's lookups read. What arrives is
in the metering API's latest events.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ValidationError

from openmeter_plugin.config.metering_settings import Subject, SubjectPrefixesConfig
from openmeter_plugin.metering.kong_log import Consumer, KongLog
from openmeter_plugin.metering.rules import Rules
from openmeter_plugin.metering.subject import find_subject
from openmeter_plugin.units import plural
from syncd.core.model import Principal
from syncd.doctor.checks import METERING_PLUGIN, Finding, Level, Plugin
from syncd.mapping.claims import claims_of, distinct, is_excluded
from syncd.mapping.rules import MappingRules
from syncd.metering.base import ArrivedEvent

CHECK = "consumers"
_MAX_NAMED = 3

Mapped = Mapping[tuple[str, str], str | None]
"""Kind and id of a principal -> its subject, None if syncd cannot map it (`syncd plan` shows why)."""


@dataclass(frozen=True, slots=True)
class Kong:
    """Plugins and consumers of a Kong, from one source; `consumers` is None if they could not be read."""

    source: str
    plugins: tuple[Plugin, ...]
    consumers: Sequence[Principal] | None


@dataclass(frozen=True, slots=True)
class _Compared:
    """The subject that the plugin sends for a consumer, and the one that syncd maps it to; None for none."""

    consumer: Principal
    sent: str | None
    mapped: str | None


def mapped_subjects(principals: Iterable[Principal], rules: MappingRules) -> Mapped:
    """Return the subjects that syncd maps, without principals that are excluded or have no id."""
    principals = distinct(principals)
    claims, _ = claims_of(principals, rules)
    subjects = {(claim.principal.kind, claim.principal.id): claim.subject_key for claim in claims}
    keys = ((one.kind, one.id) for one in principals if one.id and not is_excluded(one, rules))
    return {key: subjects.get(key) for key in keys}


def check_subjects(
    kongs: Sequence[Kong], others: Mapping[str, Sequence[Principal]], subjects: Mapped
) -> Iterator[Finding]:
    """Find differences between plugin and syncd; `others` are the principals of sources without plugins."""
    by_source = {kong.source: _metering_plugins(kong) for kong in kongs}
    if not any(by_source.values()):
        return  # `check_plugins` reports it
    for kong in kongs:
        yield from _of_kong(kong, by_source[kong.source], subjects)
    plugins = [plugin for found in by_source.values() for plugin in found]
    seen = {one.id for kong in kongs for one in kong.consumers or ()}
    for source, principals in others.items():
        applications = [one for one in principals if one.kind == "application"]
        yield from _applications(source, applications, plugins, subjects)
        unseen = {one.id for one in principals if one.kind == "consumer"} - seen
        if unseen:
            text = (
                f"{source} names {plural(len(unseen), 'consumer')} of gateways whose plugins syncd cannot"
                " read. Compare subject.field and subject.fallbacks there with mapping.subject_field by hand"
            )
            yield Finding(CHECK, Level.WARNING, text)


def _metering_plugins(kong: Kong) -> list[Plugin]:
    return [plugin for plugin in kong.plugins if plugin.enabled and plugin.name == METERING_PLUGIN]


def _of_kong(kong: Kong, metering_plugins: Sequence[Plugin], subjects: Mapped) -> Iterator[Finding]:
    if kong.consumers is None:
        text = f"{kong.source}: its consumers could not be read, so they are not compared with its plugins"
        yield Finding(CHECK, Level.WARNING, text)
        return
    consumers = [one for one in kong.consumers if (one.kind, one.id) in subjects]
    if consumers and not metering_plugins:
        text = (
            f"{kong.source} shows no plugin {METERING_PLUGIN}, so the subjects of its {len(consumers)}"
            " consumers are unknown. Compare by hand"
        )
        yield Finding(CHECK, Level.WARNING, text)
    own = [plugin for plugin in metering_plugins if plugin.consumer and not plugin.is_partial]
    for plugin in metering_plugins:
        if plugin.unread is not None:
            continue  # reported with its name
        if plugin.is_of_a_group:
            text = (
                f"{plugin.place}: a plugin is for one consumer group, whose members syncd does not read."
                " Compare its subject.field and subject.fallbacks with mapping.subject_field by hand"
            )
            yield Finding(CHECK, Level.WARNING, text)
        elif plugin.consumer:
            yield from _compared(plugin, [one for one in consumers if _is_for(plugin, one)], subjects)
        else:
            # A consumer's own plugin takes precedence in Kong.
            rest = [one for one in consumers if not any(_is_for(other, one) for other in own)]
            yield from _compared(plugin, rest, subjects)


def _is_for(plugin: Plugin, consumer: Principal) -> bool:
    return plugin.consumer in (consumer.id, consumer.username, consumer.custom_id)


def _compared(plugin: Plugin, consumers: Sequence[Principal], subjects: Mapped) -> Iterator[Finding]:
    if not consumers:
        return
    try:
        rules = rules_of(plugin)
    except ValidationError as error:
        messages = "; ".join(fault["msg"] for fault in error.errors(include_input=False, include_url=False))
        yield Finding(CHECK, Level.PROBLEM, f"{plugin.place}: the plugin's subject is invalid: {messages}")
        return
    if not any(lookup.place == "consumer" for lookup in rules.lookups):
        text = (
            f"{plugin.place}: the plugin looks for no consumer:"
            f" {plural(len(consumers), 'consumer is', 'consumers are')} not compared"
        )
        yield Finding(CHECK, Level.WARNING, text)
        return
    found = [_Compared(one, _sent_subject(one, rules), subjects[one.kind, one.id]) for one in consumers]
    yield from _findings(plugin, found, rules)


def _findings(plugin: Plugin, found: Sequence[_Compared], rules: Rules) -> Iterator[Finding]:
    differing = sorted((one for one in found if one.sent != one.mapped), key=lambda one: one.consumer.label())
    if not differing:
        sent = plural(
            len(found), "consumer is sent under the subject", "consumers are sent under the subjects"
        )
        text = f"{plugin.place}: {sent} that syncd maps"
        yield Finding(CHECK, Level.OK, text)
    if not_found := [one for one in differing if one.sent is None]:
        yield Finding(CHECK, Level.PROBLEM, _not_found_text(plugin, _named(not_found, found), rules))
    if sent_differently := [one for one in differing if one.sent and one.mapped]:
        first = sent_differently[0]
        text = (
            f"{plugin.place}: {_named(sent_differently, found)} are sent under another subject than syncd"
            f" maps, {first.consumer.label()} as {first.sent!r} and not as {first.mapped!r}: their customers"
            " do not get that usage. Make the plugin's subject.field, subject.fallbacks and subject_prefixes"
            " agree with mapping.subject_field and mapping.subject_prefixes"
        )
        yield Finding(CHECK, Level.PROBLEM, text)
    if unmapped := [one for one in differing if one.mapped is None]:
        first = unmapped[0]
        text = (
            f"{plugin.place}: {_named(unmapped, found)} are sent, {first.consumer.label()} as {first.sent!r},"
            " but syncd maps them to no subject. `syncd plan` shows why and what to do"
        )
        yield Finding(CHECK, Level.WARNING, text)


def _not_found_text(plugin: Plugin, who: str, rules: Rules) -> str:
    fates = {
        "skip": "are not billed",
        "fallback": f"are billed to {rules.fallback_subject!r}",
        "quarantine": "go to the quarantine",
    }
    elsewhere = " or ".join(sorted({one.place for one in rules.lookups} - {"consumer"}))
    unless = f", unless the {elsewhere} identifies someone" if elsewhere else ""
    return (
        f"{plugin.place}: the plugin's lookups do not find {who}, so their requests"
        f" {fates[rules.missing]}{unless}; syncd maps them. Add `look_up_value_in: consumer` to"
        " subject.fallbacks, which sends their id as subject, or give each the field that subject.field names"
    )


def _named(some: Sequence[_Compared], of: Sequence[_Compared]) -> str:
    names = [one.consumer.username or one.consumer.custom_id or one.consumer.id for one in some]
    rest = len(names) - _MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{len(names)} of {plural(len(of), 'consumer')} ({', '.join(names[:_MAX_NAMED])}{more})"


def _applications(
    source: str, applications: Collection[Principal], plugins: Sequence[Plugin], subjects: Mapped
) -> Iterator[Finding]:
    wanted = [(one, key) for one in applications if (key := subjects.get((one.kind, one.id)))]
    if not wanted:
        return
    for plugin in plugins:
        if plugin.unread is not None:
            continue
        try:
            rules = rules_of(plugin)
        except ValidationError:
            continue  # reported with its consumers
        if all(_sent_subject(one, rules) == key for one, key in wanted):
            sent = plural(
                len(wanted),
                f"application of {source} is sent as syncd maps it",
                f"applications of {source} are sent as syncd maps them",
            )
            text = f"{plugin.place}: {sent}"
            yield Finding("applications", Level.OK, text)
            return
    text = (
        f"no plugin that syncd can read sends {plural(len(wanted), 'application')} of {source} by their id,"
        " as syncd maps them. Add `look_up_value_in: application` to subject.fallbacks of the gateways that"
        " they call. This is normal if such a gateway is not among the sources"
    )
    yield Finding("applications", Level.WARNING, text)


def rules_of(plugin: Plugin) -> Rules:
    """Return the plugin's rules to find subjects; raises ValidationError.

    The Admin API shows unset fields as null.
    """
    given = plugin.config.get("subject")
    fields = (
        {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    )
    subject = Subject.model_validate(fields)
    prefixes = plugin.config.get("subject_prefixes") or {}
    never = plugin.config.get("application_context") == "never"
    return Rules(
        source="",
        prefixes=SubjectPrefixesConfig.model_validate(
            prefixes if isinstance(prefixes, dict) else {}
        ).compiled(),
        lookups=subject.lookups,
        require_consumer=subject.require_consumer,
        missing=subject.missing,
        fallback_subject=subject.fallback_subject or "",
        application_context="never" if never else "when_needed",
    )


def _sent_subject(principal: Principal, rules: Rules) -> str | None:
    """Return the subject that the plugin finds for a request of this principal, None if it finds none."""
    if principal.kind == "application":
        asked = rules.application_context != "never"
        found = find_subject(KongLog(), {"application_id": principal.id} if asked else None, rules)
    else:
        consumer = Consumer(
            principal.id or None,
            principal.username or None,
            principal.custom_id or None,
            list(principal.tags),
        )
        found = find_subject(KongLog(consumer=consumer), None, rules)
    return found if type(found) is str else None


ARRIVALS = "arrivals"
_OURS = "kong."
_ID_SIZE = 36
"""Kong's and Konnect's ids are UUIDs."""
_MANY = 1000
"""Requests without any event that are worth a look: Kong counts those of its Admin API, too."""


class _Form(NamedTuple):
    """How an id becomes a subject: ``app:...``; without a prefix, it is not made of the id."""

    prefix: str | None

    def __str__(self) -> str:
        return "another field" if self.prefix is None else f"{self.prefix}..."


def check_arrivals(
    events: Sequence[ArrivedEvent],
    principals: Sequence[Principal],
    rules: MappingRules,
    answered: int = 0,
) -> Iterator[Finding]:
    """Compare the subjects of the latest events with those that syncd maps `principals` to.

    A subject that a customer has is fine however it got there. `answered` is the number of requests that the
    Kongs have answered.
    """
    arrived = {event.subject: event for event in events if event.type.startswith(_OURS)}
    if not arrived and answered >= _MANY:
        text = (
            f"Kong has answered {plural(answered, 'request')} since its start, and the metering API has no"
            " event of a gateway. Look for `openmeter` and `pluginserver` in Kong's error log: if Kong cannot"
            " run the start command (a program without its path, a $(...) that fails), it works but meters"
            " nothing"
        )
        yield Finding(ARRIVALS, Level.WARNING, text)
        return
    if not arrived:
        text = "the metering API has no event of a gateway yet, so no subject can be compared"
        yield Finding(ARRIVALS, Level.OK, text)
        return
    mapped = mapped_subjects(principals, rules)
    known = set(mapped.values())
    stray = sorted(
        subject
        for subject, event in arrived.items()
        if event.customer_id is None and subject not in known  # mapped ones are attached by the next run
    )
    if not stray:
        what = plural(len(arrived), "subject is", "subjects are")
        latest = plural(len(events), "event")
        yield Finding(ARRIVALS, Level.OK, f"of the latest {latest}, {what} on a customer or mapped")
        return
    mismatched = _mismatches(stray, mapped)
    for (arrives, wanted), subjects in mismatched.items():
        yield Finding(ARRIVALS, Level.PROBLEM, _mismatch_text(arrives, wanted, subjects))
    unknown = [subject for subject in stray if not any(subject in found for found in mismatched.values())]
    if unknown:
        what = plural(len(unknown), "subject of the latest events is", "subjects of the latest events are")
        text = (
            f"{what} on no customer, and syncd maps {'it' if len(unknown) == 1 else 'none of them'}:"
            f" {_listed(unknown)}. `syncd usage` shows their usage; a source is missing, or a principal was"
            " deleted"
        )
        yield Finding(ARRIVALS, Level.WARNING, text)


def _mismatches(stray: Iterable[str], mapped: Mapped) -> dict[tuple[_Form, _Form], list[str]]:
    """Return the subjects that end with the id of a principal that syncd maps to another subject."""
    by_id = {identity: subject for (_, identity), subject in mapped.items() if len(identity) == _ID_SIZE}
    found: dict[tuple[_Form, _Form], list[str]] = {}
    for subject in stray:
        identity = subject[-_ID_SIZE:]
        if wanted := by_id.get(identity):
            forms = _Form(subject[:-_ID_SIZE]), _form_of(wanted, identity)
            found.setdefault(forms, []).append(subject)
    return found


def _form_of(subject: str, identity: str) -> _Form:
    return _Form(subject.removesuffix(identity) if subject.endswith(identity) else None)


def _mismatch_text(arrives: _Form, wanted: _Form, subjects: Sequence[str]) -> str:
    count = plural(len(subjects), "subject arrives", "subjects arrive")
    cause = (
        "Make mapping.subject_field agree with the gateways' subject.field"
        if wanted.prefix is None
        else "Make mapping.subject_prefixes agree with the gateways' subject_prefixes"
    )
    return (
        f"{count} as {arrives}, syncd maps {wanted} ({_listed(subjects)}): that usage is on no customer."
        f" {cause}. Events that have arrived keep their subject: add it to the customer by hand"
    )


def _listed(subjects: Sequence[str]) -> str:
    rest = len(subjects) - _MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{', '.join(map(repr, subjects[:_MAX_NAMED]))}{more}"
