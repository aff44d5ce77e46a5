"""What people see of the gate: as JSON for the API, the dashboard, the command line and the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from openmeter_plugin import __version__

if TYPE_CHECKING:
    from openmeter_plugin.gate.service import Gate

_CLOSE: Final = 0.1
"""Close to the end: less than a tenth of the allowance is left."""
_SHOWN: Final = 200


def view(gate: Gate) -> dict[str, Any]:
    """Return the state of a gate as a document; lists show at most 200 items."""
    now = time.monotonic()
    denied = list(_keys(gate, now))
    return {
        "version": __version__,
        "mode": gate.settings.mode,
        "subjects": len(gate.accounts.subjects),
        "keys": len(gate.accounts.entries),
        "denied": [item for item in denied if item["reason"] is not None][:_SHOWN],
        "close": sorted(
            (item for item in denied if item["reason"] is None), key=lambda item: float(item["left"])
        )[:_SHOWN],
        "stopped": [
            dict(zip(("subject", "feature", "reason", "mode"), key, strict=True))
            | {"count": stopped.count, "last_at": stopped.last_at}
            for key, stopped in sorted(gate.stopped.items(), key=lambda item: -item[1].last_at)[:_SHOWN]
        ],
        "overrides": [asdict(override) for override in gate.overrides.all()],
        "figures": figures(gate),
        "last_error": gate.last_error,
    }


def _keys(gate: Gate, now: float) -> Iterator[dict[str, Any]]:
    subjects: dict[str, list[str]] = {}
    for subject, account in gate.accounts.subjects.items():
        subjects.setdefault(account, []).append(subject)
    for key in list(gate.accounts.entries):
        decision = gate.accounts.decide(key, now)
        if decision is None:
            continue
        near = decision.left is not None and decision.quota and decision.left < decision.quota * _CLOSE
        if decision.reason is None and not near:
            continue
        yield {
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
        "decisions": [[*labels, count] for labels, count in sorted(gate.decisions.items())],
        "calls": [[*labels, count] for labels, count in sorted(gate.client.calls.items())],
        "errors": dict(gate.errors),
        "overshoot": dict(gate.overshoot),
        "subjects": len(gate.accounts.subjects),
        "overrides": len(gate.overrides.all()),
        "state_age": staleness(gate, now),
        "backlog": gate.schedule.backlog(now),
        "answer_age": None if gate.last_answer is None else now - gate.last_answer,
        "records": gate.tail.records,
        "kongs": [
            {"id": kong, "lua": side.lua, "heard": now - side.heard_at, **side.figures}
            for kong, side in sorted(gate.kongs.items())
        ],
    }


def staleness(gate: Gate, now: float) -> float:
    """Return the age of the oldest reading of an active subject, in seconds; 0 without one."""
    active = gate.settings.active_for
    ages = [
        now - entry.access_at
        for subject, seen in gate.schedule.last_seen.items()
        if now - seen <= active and (account := gate.accounts.subjects.get(subject)) is not None
        for feature in gate.settings.features[:1]
        if (entry := gate.accounts.entries.get((account, feature.key))) is not None  # type: ignore[call-overload]
    ]
    return max(ages, default=0.0)
