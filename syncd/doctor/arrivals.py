"""Check that usage arrives under the subjects that syncd maps, by the metering API's latest events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from openmeter_plugin.units import plural
from syncd.core.model import Principal
from syncd.doctor.checks import Finding, Level
from syncd.doctor.subjects import Mapped, mapped_subjects
from syncd.mapping.rules import MappingRules
from syncd.metering.base import ArrivedEvent

CHECK = "arrivals"
_OURS = "kong."
_ID_SIZE = 36
"""Kong's and Konnect's ids are UUIDs."""
_MAX_NAMED = 3
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
        yield Finding(CHECK, Level.WARNING, text)
        return
    if not arrived:
        text = "the metering API has no event of a gateway yet, so no subject can be compared"
        yield Finding(CHECK, Level.OK, text)
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
        yield Finding(CHECK, Level.OK, f"of the latest {latest}, {what} on a customer or mapped")
        return
    mismatched = _mismatches(stray, mapped)
    for (arrives, wanted), subjects in mismatched.items():
        yield Finding(CHECK, Level.PROBLEM, _mismatch_text(arrives, wanted, subjects))
    unknown = [subject for subject in stray if not any(subject in found for found in mismatched.values())]
    if unknown:
        what = plural(len(unknown), "subject of the latest events is", "subjects of the latest events are")
        text = (
            f"{what} on no customer, and syncd maps {'it' if len(unknown) == 1 else 'none of them'}:"
            f" {_named(unknown)}. `syncd usage` shows their usage; a source is missing, or a principal was"
            " deleted"
        )
        yield Finding(CHECK, Level.WARNING, text)


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
        f"{count} as {arrives}, syncd maps {wanted} ({_named(subjects)}): that usage is on no customer."
        f" {cause}. Events that have arrived keep their subject: add it to the customer by hand"
    )


def _named(subjects: Sequence[str]) -> str:
    rest = len(subjects) - _MAX_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{', '.join(map(repr, subjects[:_MAX_NAMED]))}{more}"
