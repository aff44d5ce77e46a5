"""What people see of the gate: as JSON for the API, the dashboard, the command line and the metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from heapq import nlargest, nsmallest
from typing import Any, Final

from openmeter_plugin import __version__
from openmeter_plugin.gate.accounts import Decision, Key, Reason
from openmeter_plugin.gate.service import Gate

_CLOSE: Final = 0.1
"""Close to the limit: less than a tenth of the allowance is left."""
_SHOWN: Final = 200
_PIECE: Final = 500
"""Entries that are decided at once: 2 ms."""


async def view(gate: Gate) -> dict[str, Any]:
    """Return the state of a gate as a document; lists show at most 200 items."""
    denied, close, counts = await _shown(gate)
    return {
        "version": __version__,
        "mode": gate.settings.mode,
        "on_stale": gate.settings.on_stale,
        "features": [feature.key for feature in gate.settings.features],
        "subjects": len(gate.accounts.subjects),
        "keys": len(gate.accounts.entries),
        "denied": denied,
        "denied_counts": [[*labels, count] for labels, count in sorted(counts.items())],
        "close": close,
        "stopped": [
            dict(zip(("subject", "feature", "reason", "mode"), key, strict=True))
            | {"count": stopped.count, "last_at": stopped.last_at}
            for key, stopped in nlargest(_SHOWN, gate.kongs.stopped.items(), key=lambda item: item[1].last_at)
        ],
        "overrides": [asdict(override) for override in gate.overrides.all()],
        "figures": figures(gate),
        "last_error": gate.last_error,
    }


async def _shown(
    gate: Gate,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[tuple[str, str]]]:
    """Return who is denied, who is close to the limit, and how many are denied by feature and reason.

    The event loop does other work in between.
    """
    counts: Counter[tuple[str, str]] = Counter()
    denied: list[tuple[Key, Decision]] = []
    close: list[tuple[Key, Decision]] = []
    keys = list(gate.accounts.entries)
    for start in range(0, len(keys), _PIECE):
        now = time.monotonic()
        for key in keys[start : start + _PIECE]:
            decision = gate.accounts.decide(key, now)
            if decision is None:
                continue
            if decision.reason is not None:
                counts[key.feature, decision.reason.value] += 1
                if len(denied) < _SHOWN:
                    denied.append((key, decision))
            elif decision.left is not None and decision.quota and decision.left < decision.quota * _CLOSE:
                close.append((key, decision))
        await asyncio.sleep(0)
    close = nsmallest(_SHOWN, close, key=lambda item: item[1].left or 0.0)
    shown = {key.account for key, _ in (*denied, *close)}
    subjects: dict[str, list[str]] = {}
    for subject, account in gate.accounts.subjects.items():
        if account in shown:
            subjects.setdefault(account, []).append(subject)
    return (
        [_item(key, decision, subjects) for key, decision in denied],
        [_item(key, decision, subjects) for key, decision in close],
        counts,
    )


def _item(key: Key, decision: Decision, subjects: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "account": key.account,
        "subjects": subjects.get(key.account, [])[:5],
        "feature": key.feature,
        "reason": decision.reason,
        "left": decision.left,
        "quota": decision.quota,
        "reset": decision.reset,
    }


def figures(gate: Gate) -> dict[str, Any]:
    """Return the figures for the metrics."""
    now = time.monotonic()
    return {
        "decisions": [[*labels, count] for labels, count in sorted(_decisions(gate).items())],
        "calls": [[*labels, count] for labels, count in sorted(gate.client.calls.items())],
        "errors": dict(gate.errors),
        "overshoot": {feature.key: gate.overshoot[feature.key] for feature in gate.settings.features},
        "subjects": len(gate.accounts.subjects),
        "overrides": len(gate.overrides.all()),
        "state_age": staleness(gate, now),
        "backlog": gate.schedule.backlog(now),
        "answer_age": None if gate.last_answer is None else now - gate.last_answer,
        "records": gate.tail.records,
        "kongs": [
            {"id": kong, "lua": side.lua, "heard": now - side.heard_at, **side.figures}
            for kong, side in sorted(gate.kongs.found.items())
        ],
    }


def _decisions(gate: Gate) -> dict[tuple[str, str, str], int]:
    """Return the counts of stopped requests, with 0 for what has not happened yet, for alerts."""
    mode = gate.settings.mode
    nothing = {
        (feature.key, reason.value, mode): 0 for feature in gate.settings.features for reason in Reason
    }
    return nothing | dict(gate.kongs.decisions)


def staleness(gate: Gate, now: float) -> float:
    """Return the age of the oldest reading of an active subject, in seconds; 0 without one."""
    active = gate.settings.active_for
    ages = [
        now - entry.access_at
        for subject, seen in gate.schedule.last_seen.items()
        if now - seen <= active and (account := gate.accounts.subjects.get(subject)) is not None
        for feature in gate.settings.features[:1]
        if (entry := gate.accounts.entries.get(Key(account, feature.key))) is not None
    ]
    return max(ages, default=0.0)
