"""Lifecycle metadata: since when a managed customer, or a subject on it, is orphaned.

``orphaned-at``             the whole customer: ``20261122T085140Z``
``orphaned-at-1`` ... 16    one subject of a customer that is in use: ``20261122T085140Z-<hash of key>``

A cleared key reads ``none``: updates merge metadata, so a key stays once written, and is reused. Values
keep the label rules of the v3 API, and 17 keys leave room below its limit of 50. An unreadable value
counts as not set, so that a mistaken edit never shortens a grace period.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

ORPHANED_AT = "orphaned-at"
SUBJECT_SLOTS = tuple(f"{ORPHANED_AT}-{number}" for number in range(1, 17))
CLEARED = "none"
LIFECYCLE_KEYS = frozenset({ORPHANED_AT, *SUBJECT_SLOTS})

_FORMAT = "%Y%m%dT%H%M%SZ"
_SUBJECT_VALUE = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{16})")


def _parsed(text: object) -> datetime | None:
    """Return the time in a value of `ORPHANED_AT`, None if it has none."""
    try:
        return datetime.strptime(str(text), _FORMAT).replace(tzinfo=UTC)
    except ValueError:
        return None


def timestamp(when: datetime) -> str:
    """Format a time as the metadata hold it."""
    return when.astimezone(UTC).strftime(_FORMAT)


def customer_orphaned_since(metadata: Mapping[str, str]) -> datetime | None:
    """Return since when the whole customer is orphaned, None if it is not."""
    return _parsed(metadata.get(ORPHANED_AT))


def orphaned_subjects(metadata: Mapping[str, str]) -> dict[str, tuple[str, datetime]]:
    """Return slot and time by the digest of each orphaned subject; the oldest if one has several."""
    found: dict[str, tuple[str, datetime]] = {}
    for slot in SUBJECT_SLOTS:
        match = _SUBJECT_VALUE.fullmatch(metadata.get(slot, ""))
        since = _parsed(match[1]) if match else None
        if match and since and (match[2] not in found or since < found[match[2]][1]):
            found[match[2]] = (slot, since)
    return found


def subject_digest(subject_key: str) -> str:
    """Return the hash that represents a subject in a slot."""
    return hashlib.sha256(subject_key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def newly_orphaned(metadata: Mapping[str, str], subjects: Iterable[str], now: datetime) -> dict[str, str]:
    """Return the metadata that record these subjects as orphaned, as many as there are free slots."""
    used = {slot for slot, _ in orphaned_subjects(metadata).values()}
    free = (slot for slot in SUBJECT_SLOTS if slot not in used)
    return {
        slot: f"{timestamp(now)}-{subject_digest(subject)}"
        for slot, subject in zip(free, sorted(subjects), strict=False)
    }
