"""Check of the gates of the gateways: permissions, features, and the versions of both halves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from openmeter_plugin.units import plural
from syncd.doctor.checks import Finding, Level
from syncd.gateways.gate import Gate

CHECK = "gate"
_REFUSED = frozenset({"401", "403"})
_MAX_SILENCE = 60.0
"""Seconds without an answer of the metering API after which a gate with active subjects is blind."""


def check_gate(name: str, gate: Gate) -> Iterator[Finding]:
    """Check a gateway's gate; one finding that is ok if nothing is wrong."""
    found = [*_metering(name, gate), *_features(name, gate), *_kongs(name, gate)]
    if found:
        yield from found
        return
    text = f"{name}: the gate is in mode {gate.mode} for {plural(gate.subjects, 'subject')}"
    if not gate.figures.calls:
        text += "; none has been active yet, so its token was not used"
    yield Finding(CHECK, Level.OK, text)


def _metering(name: str, gate: Gate) -> Iterator[Finding]:
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
        yield Finding(CHECK, Level.PROBLEM, text)
    elif outcomes and (gate.figures.answer_age is None or gate.figures.answer_age > _MAX_SILENCE):
        age = gate.figures.answer_age
        since = "has not answered the gate" if age is None else f"has not answered the gate for {age:.0f} s"
        last = f" ({gate.last_error})" if gate.last_error else ""
        text = f'{name}: the metering API {since}{last}: docs/runbook.md, "The gate is blind"'
        yield Finding(CHECK, Level.PROBLEM, text)


def _features(name: str, gate: Gate) -> Iterator[Finding]:
    would = "are stopped" if gate.mode == "enforce" else "would be stopped in mode enforce"
    for feature, reason, number in gate.denied_counts:
        if reason == "FEATURE_NOT_FOUND":
            text = (
                f"{name}: the metering API has no feature {feature}, so all requests that need it {would}."
                " Create it there, or correct features in the gate's file"
            )
            yield Finding(CHECK, Level.PROBLEM, text)
        elif reason == "FEATURE_UNAVAILABLE":
            text = (
                f"{name}: {plural(number, 'active customer')} without an entitlement to {feature}: their"
                f" requests {would}. Give them one, or let no rule of the gate name this feature"
            )
            yield Finding(CHECK, Level.WARNING, text)


def _kongs(name: str, gate: Gate) -> Iterator[Finding]:
    if not gate.figures.kongs and gate.mode != "off":
        text = (
            f"{name}: no Kong asks this gate, so it stops nothing. Enable the plugin openmeter-gate, or the"
            " post-function of `openmeter-plugin gate lua`, and let Kong's workers open the gate's socket:"
            " docs/gate.md"
        )
        yield Finding(CHECK, Level.WARNING, text)
    for kong in gate.figures.kongs:
        if kong.lua and kong.lua != gate.version:
            text = (
                f"{name}: the gate is of version {gate.version}, its Lua half in Kong of {kong.lua}. Write"
                " the files again with `openmeter-plugin files` (or the text of `openmeter-plugin gate lua`),"
                " and restart Kong"
            )
            yield Finding(CHECK, Level.WARNING, text)
        if kong.no_memory:
            text = (
                f"{name}: Kong's shared dict openmeter_gate is full, so customers without a place in it are"
                " not limited. Make it larger and restart Kong"
            )
            yield Finding(CHECK, Level.WARNING, text)
        if kong.errors:
            text = (
                f"{name}: {plural(kong.errors, 'fault')} in the gate's Lua half, each of which let a request"
                " pass. Kong's error log has them"
            )
            yield Finding(CHECK, Level.WARNING, text)
