"""An audit as a document, for programs and reports. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from syncd.audit.compare import Comparison, Difference, Totals, Yardstick
from syncd.audit.redelivery import Redelivery
from syncd.audit.run import Audit
from syncd.metering.usage import rfc3339


def to_json(
    audit: Audit, redeliveries: Sequence[Redelivery] = (), *, no_effect: int | None = None
) -> dict[str, object]:
    """Return an audit as ``syncd audit -o json`` prints it; `no_effect` is None without a redelivery."""
    comparison = audit.comparison
    return {
        "from": rfc3339(comparison.since),
        "to": rfc3339(comparison.until),
        "equal": audit.is_equal and audit.incomparable_reason is None,
        "hours": comparison.hours,
        "hours_compared": comparison.hours_compared,
        "hours_left_out": [
            {"hour": rfc3339(hour), "reasons": list(why)} for hour, why in comparison.left_out.items()
        ],
        "destinations_left_out": [one.to_json() for one in audit.other_destinations],
        "requests_lost": {gateway: dict(lost) for gateway, lost in audit.lost.items()},
        "types": [_type_json(used, comparison) for used in audit.yardsticks],
        "not_compared": dict(comparison.not_compared),
        "differences": [_difference_json(one) for one in comparison.differences],
        "redeliveries": [one.to_json() for one in redeliveries],
        "redelivered_without_effect": no_effect,
    }


def _type_json(used: Yardstick, comparison: Comparison) -> dict[str, object]:
    totals = comparison.totals.get(used.type, Totals())
    numbers = {
        "delivered": totals.delivered,
        "dead_lettered": totals.dead_lettered,
        "counted": totals.counted if used.exact else None,
        "missing": totals.missing,
        "refused": totals.refused,
        "lost": totals.lost,
        "surplus": totals.surplus,
    }
    return {"type": used.type, "meter": used.meter, "exact": used.exact, **numbers}


def _difference_json(one: Difference) -> dict[str, object]:
    return {
        "hour": rfc3339(one.line.hour),
        "type": one.line.type,
        "subject": one.line.subject,
        "delivered": one.delivered,
        "dead_lettered": one.dead_lettered,
        "counted": one.counted,
        "missing": one.missing,
        "refused": one.refused,
        "lost": one.lost,
        "surplus": one.surplus,
        "gateways": [
            {
                "name": name,
                "delivered": sent.delivered,
                "dead_lettered": sent.dead_lettered,
                "lost": sent.gone,
            }
            for name, sent in one.gateways
        ],
    }
