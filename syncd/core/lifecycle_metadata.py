"""Since when is it gone? The marks that say so, in the metadata of a customer of ours.

``orphaned-at``             the whole customer: ``20261122T085140Z``
``orphaned-at-1`` ... 16    single subjects of a customer that lives on: ``20261122T085140Z-<hash of key>``

A mark that is over reads ``none``: updates merge metadata, so a key once written stays and is used
again. Values keep the label rules of the v3 API, and 17 keys leave room below its limit of 50. A value
that cannot be read counts as no mark, so that a mistake of someone's never shortens a grace period.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

CUSTOMER_MARK = "orphaned-at"
SLOTS = tuple(f"{CUSTOMER_MARK}-{number}" for number in range(1, 17))
OVER = "none"
KEYS = frozenset({CUSTOMER_MARK, *SLOTS})

_FORMAT = "%Y%m%dT%H%M%SZ"
_SUBJECT_MARK = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{16})")


def moment(text: object) -> datetime | None:
    """Return the time of a mark, None where it is none."""
    try:
        return datetime.strptime(str(text), _FORMAT).replace(tzinfo=UTC)
    except ValueError:
        return None


def stamp(when: datetime) -> str:
    """Return the time as marks carry it."""
    return when.astimezone(UTC).strftime(_FORMAT)


def customer_gone_since(metadata: Mapping[str, str]) -> datetime | None:
    """Return since when the whole customer is marked."""
    return moment(metadata.get(CUSTOMER_MARK))


def subject_marks(metadata: Mapping[str, str]) -> dict[str, tuple[str, datetime]]:
    """Return the marks of subjects: hash -> slot and time; the oldest of several for one subject."""
    found: dict[str, tuple[str, datetime]] = {}
    for slot in SLOTS:
        match = _SUBJECT_MARK.fullmatch(metadata.get(slot, ""))
        since = moment(match[1]) if match else None
        if match and since and (match[2] not in found or since < found[match[2]][1]):
            found[match[2]] = (slot, since)
    return found


def digest(subject_key: str) -> str:
    """Return the name of a subject in a mark."""
    return hashlib.sha256(subject_key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def new_marks(metadata: Mapping[str, str], subjects: Iterable[str], now: datetime) -> dict[str, str]:
    """Return marks for as many of these subjects as there are free slots."""
    used = {slot for slot, _ in subject_marks(metadata).values()}
    free = (slot for slot in SLOTS if slot not in used)
    return {
        slot: f"{stamp(now)}-{digest(subject)}" for slot, subject in zip(free, sorted(subjects), strict=False)
    }
