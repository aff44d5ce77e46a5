"""Ownership metadata of a customer, its lifecycle metadata (since when it is orphaned), and the label rules.

A customer is managed if its metadata carry both syncd's name and this `owner_id`; with another owner_id
it is as foreign as without ownership metadata. The values keep the label rules of the v3 API, so that a
v1 customer keeps its owner when it is read through v3. What no label can hold is written as a stand-in
(`label_value`). Earlier versions wrote some such texts as they are, through v1; both forms mean the same
(`is_same_value`).

The label rules are those of the v3 specification and of its server, which is narrower
(api/v3/labels/validate.go): keys and values have to match ::

    ^(?:[a-zA-Z0-9](?:[a-zA-Z0-9._-]?[a-zA-Z0-9])?){1,63}$

So separators stand alone, and a single letter or digit between two of them is refused: ``a-b-c``, but not
``a-b`` or ``a-bc-d``. It reserves more prefixes as well. A label is safe if both accept it.

Since when a managed customer, or a subject on it, is orphaned ::

    orphaned-at              the whole customer: 20261122T085140Z
    orphaned-at-1 ... 16     one subject of a customer that is in use: 20261122T085140Z-<hash of key>

A cleared key reads ``none``: updates merge metadata, so a key stays once written, and is reused. 17 keys
leave room below the v3 API's limit of 50. An unreadable value counts as not set, so that a mistaken edit
never shortens a grace period.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from syncd.core.model import ObservedCustomer, ObservedSubject

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


_RESERVED = re.compile(r"_|kong|konnect|insomnia|mesh|kic|kuma|openmeter")
# The server's expression for texts whose only separator is a dash, without its ambiguity: tried on a text
# that does not match, that one takes time exponential in the length (Go's engine does not backtrack).
_SAFE = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]{2,})*(?:-[A-Za-z0-9]+)?")
_MAX_LENGTH = 63


def is_label_value(text: str) -> bool:
    """Return whether `text` is a valid key or value of a label."""
    return len(text) <= _MAX_LENGTH and _SAFE.fullmatch(text) is not None


def has_reserved_prefix(key: str) -> bool:
    """Return whether the server refuses a label with this key because of its prefix."""
    return _RESERVED.match(key) is not None


def is_label(key: str, value: str) -> bool:
    """Return whether servers of all versions accept this label."""
    return is_label_value(key) and is_label_value(value) and not has_reserved_prefix(key)


def valid_labels(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that are valid labels; ownership metadata always are."""
    return {key: value for key, value in metadata.items() if is_label(key, value)}


MANAGED_BY = "managed-by"
SYNC_OWNER = "sync-owner"
SOURCE_ID = "source-id"
MANAGER = "kong-openmeter"
"""The value of `MANAGED_BY`."""
ADOPTED = "adopted"
"""On a customer that a person created and syncd adopted: its name is never changed."""
CUSTOMER_GROUP = "customer-group"
"""On a customer that was split off a group: the key of the group."""
RESERVED_KEYS = frozenset({CUSTOMER_GROUP, MANAGED_BY, SYNC_OWNER, SOURCE_ID, ADOPTED}) | LIFECYCLE_KEYS

# openmeter/subject/service/hooks/customersubject.go: the server creates a subject entity for each
# subject key of a customer and writes itself and the customer into the metadata.
_PROVISIONER_KEYS = frozenset({"createdBy", "customerId"})
_PROVISIONER = "subject.provisioner"


def label_value(text: str) -> str:
    """Return `text` if it is a valid label value, else its stand-in: ``sha256-<48 hex>``."""
    if is_label_value(text):
        return text
    return f"sha256-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"


def is_same_value(found: object, wanted: str) -> bool:
    """Return whether a value of ownership metadata is the wanted one, as it is or as its stand-in."""
    return found == wanted or (isinstance(found, str) and label_value(found) == label_value(wanted))


def ownership_metadata(owner_id: str, source_id: str) -> dict[str, str]:
    """Return the ownership metadata; what a label cannot hold is replaced by its stand-in."""
    return {MANAGED_BY: MANAGER, SYNC_OWNER: label_value(owner_id), SOURCE_ID: label_value(source_id)}


def is_managed(metadata: Mapping[str, object], owner_id: str) -> bool:
    """Return whether these metadata carry the ownership metadata of this owner_id."""
    return metadata.get(MANAGED_BY) == MANAGER and is_same_value(metadata.get(SYNC_OWNER), owner_id)


def is_adoptable(metadata: Mapping[str, object]) -> bool:
    """Return whether a customer carries no owner's metadata; one of another owner is never adopted."""
    return MANAGED_BY not in metadata and SYNC_OWNER not in metadata


def owner_of(customer: ObservedCustomer) -> str:
    """Return what messages call the owner of a customer that is not managed."""
    if customer.metadata.get(MANAGED_BY) == MANAGER:
        return f"sync-owner {customer.metadata.get(SYNC_OWNER)!r}"
    if customer.metadata.get(MANAGED_BY):
        return f"{customer.metadata[MANAGED_BY]!r}"
    return "someone else (it has no ownership metadata)"


def may_write_subject(subject: ObservedSubject, owner_id: str) -> bool:
    """Return whether a subject entity may be written: it is managed, or still blank.

    The server creates blank ones by itself for each managed customer.
    """
    return is_managed(subject.metadata, owner_id) or is_blank_subject(
        subject.key, subject.display_name, subject.metadata
    )


def is_blank_subject(key: str, display_name: str | None, metadata: Mapping[str, object]) -> bool:
    """Return whether a subject entity has only its key and the server's own fields, nothing of a person."""
    if display_name not in (None, "", key):
        return False
    made_by_server = metadata.get("createdBy") == _PROVISIONER
    return not metadata or (made_by_server and set(metadata) <= _PROVISIONER_KEYS)
