"""Making a retired customer again, where the one that was to take its subject refuses it."""

from __future__ import annotations

from syncd.changes import Change
from syncd.targets import MeteringTarget


def restore(target: MeteringTarget, retired: Change) -> None:
    """Create the customer anew as it was before; it gets another id. Raises RefusedError."""
    before = retired.before
    assert before is not None  # noqa: S101 - the planner gives every retirement what there was
    key = retired.customer_key or ""
    metadata = {name: str(value) for name, value in (before.metadata or {}).items()}
    target.create_customer(key, before.name or key, before.subject_keys or (), metadata, before.details)
