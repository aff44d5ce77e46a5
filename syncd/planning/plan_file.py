"""Plan files: written by ``plan --out FILE`` for review, checked by ``apply --plan FILE``.

A run always applies a fresh plan. The file only decides whether it may: both must be the same change by
change (`Change.identity`), so that only reviewed changes happen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from syncd.core.changes import PLAN_VERSION, Cause, Change, ChangeKind, EntityState, MovedUsage, Plan
from syncd.core.errors import PlanFileError
from syncd.core.model import CustomerDetails

_MAX_SHOWN = 5


def write(plan: Plan, path: Path, options: Mapping[str, object]) -> None:
    """Write a plan and the options that it was made with; raises PlanFileError."""
    document = {**plan.to_json(), "options": dict(options)}
    try:
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanFileError(f"cannot write the plan {path}: {error.strerror}") from None


def read(path: Path) -> tuple[Plan, dict[str, object]]:
    """Return a written plan and its options; raises PlanFileError if the file is no plan or was edited."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanFileError(f"cannot read the plan {path}: {error.strerror}") from None
    except ValueError as error:
        raise PlanFileError(f"the plan {path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("version") != PLAN_VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise PlanFileError(
            f"{path} is not a plan of version {PLAN_VERSION} (its version is {version!r}); create one with"
            " `plan --out`"
        )
    try:
        plan = from_json(document)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFileError(f"the plan {path} cannot be read: {type(error).__name__} {error}") from None
    if plan.checksum() != document.get("checksum"):
        raise PlanFileError(f"the plan {path} was edited after it was written; create a new one")
    options = document.get("options")
    return plan, options if isinstance(options, dict) else {}


def from_json(document: Mapping[str, Any]) -> Plan:
    """Return the plan of a `Plan.to_json` document, without unbilled usage; raises KeyError or ValueError."""
    changes = tuple(_change(item) for item in document["changes"])
    notes = tuple(str(note) for note in document.get("notes", ()))
    return Plan(str(document["owner_id"]), str(document["policy"]), changes, notes)


def _change(item: Mapping[str, Any]) -> Change:
    usage = item.get("usage")
    return Change(
        ChangeKind(item["kind"]),
        item["customer_key"],
        tuple(item["subject_keys"]),
        item["reason"],
        item["customer_id"],
        _state(item["before"]),
        _state(item["after"]),
        item.get("to_customer_key"),
        MovedUsage(usage["events"], usage["since"]) if usage else None,
        item.get("settled") is True,
        tuple(item.get("names", ())),
        Cause(item["cause"]) if item.get("cause") else None,
        item.get("fact", ""),
    )


def _state(item: Mapping[str, Any] | None) -> EntityState | None:
    if item is None:
        return None
    keys = item.get("subject_keys")
    details = CustomerDetails.from_json(item.get("details") or {})
    return EntityState(item.get("name"), None if keys is None else tuple(keys), item.get("metadata"), details)


def require_same(reviewed: Plan, fresh: Plan) -> None:
    """Raise PlanFileError with the first differences unless both plans make the same changes."""
    if reviewed.checksum() == fresh.checksum():
        return
    differences = []
    if (reviewed.owner_id, reviewed.policy) != (fresh.owner_id, fresh.policy):
        differences.append(
            f"it was made for owner_id {reviewed.owner_id!r} and policy {reviewed.policy!r}, the"
            f" configuration has {fresh.owner_id!r} and {fresh.policy!r}"
        )
    before, now = _identities(reviewed), _identities(fresh)
    differences += [f"no longer: {before[key]}" for key in before.keys() - now.keys()]
    differences += [f"new: {now[key]}" for key in now.keys() - before.keys()]
    rest = len(differences) - _MAX_SHOWN
    more = [f"and {rest} more"] if rest > 0 else []
    listed = "\n  ".join([*sorted(differences)[:_MAX_SHOWN], *more]) or "the order of the changes differs"
    raise PlanFileError(
        "the plan is out of date: a fresh plan differs, so nothing was changed. Plan and review again:"
        f"\n  {listed}"
    )


def _identities(plan: Plan) -> dict[str, str]:
    return {
        json.dumps(change.identity(), sort_keys=True): " ".join(
            [str(change.kind), change.customer_key or "-", *change.subject_keys[:3]]
        )
        for change in plan.actionable
    }
