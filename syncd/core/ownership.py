"""Whose is it? The marks that say so, and the label rules that they keep.

We own a customer when its metadata carry both our name and our `owner_id`; a customer of another
owner_id is as foreign as one without marks. The marks are valid under the label rules of the v3
API too, so that a v1 customer keeps its owner when it is read through v3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from syncd.core.lifecycle_metadata import KEYS as ORPHAN_KEYS
from syncd.core.model import ObservedCustomer, ObservedSubject

# MERGED: The label rules of the v3 API, as its specification and its server's code have them.
#
# api/v3/labels/validate.go is narrower than the specification: separators only one at a time, which
# also refuses ``a--b``; and it reserves more prefixes. A label is safe where both accept it.

_RESERVED = re.compile(r"_|kong|konnect|insomnia|mesh|kic|kuma|openmeter")
# Letters and digits with single separators between them. The server's own expression reads pairs, and
# refuses some of what this accepts with a dot or an underscore (``a_b-c.d``), so only dashes are safe.
_SAFE = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")
_LONGEST = 63


def is_label_value(text: str) -> bool:
    """Tell whether `text` may stand in a label as it is."""
    return len(text) <= _LONGEST and _SAFE.fullmatch(text) is not None


def has_reserved_prefix(key: str) -> bool:
    """Tell whether the server refuses a label of this key because of how it begins."""
    return _RESERVED.match(key) is not None


def is_label(key: str, value: str) -> bool:
    """Tell whether a server takes this label, whatever its version."""
    return is_label_value(key) and is_label_value(value) and not has_reserved_prefix(key)


def without_unlabelled(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of these metadata can be labels; our marks always can."""
    return {key: value for key, value in metadata.items() if is_label(key, value)}


MANAGED_BY = "managed-by"
SYNC_OWNER = "sync-owner"
SOURCE_ID = "source-id"
US = "kong-openmeter"
ADOPTED = "adopted"
"""On a customer that people made and that we took over: its name stays theirs."""
CUSTOMER_GROUP = "customer-group"
"""On a customer that was split off a group: the key of the group."""
RESERVED_KEYS = frozenset({CUSTOMER_GROUP, MANAGED_BY, SYNC_OWNER, SOURCE_ID, ADOPTED}) | ORPHAN_KEYS

# openmeter/subject/service/hooks/customersubject.go: the server makes a subject entity for each
# subject key of a customer and notes itself and the customer in the metadata.
_PROVISIONER_KEYS = frozenset({"createdBy", "customerId"})
_PROVISIONER = "subject.provisioner"


def label_value(text: str) -> str:
    """Return `text` where it is a valid label value, else a stable stand-in: ``sha256-<48 hex>``."""
    if is_label_value(text):
        return text
    return f"sha256-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"


def ownership_metadata(owner_id: str, source_id: str) -> dict[str, str]:
    """Return the metadata that make an entity ours; `source_id` is encoded where a label cannot hold it."""
    return {MANAGED_BY: US, SYNC_OWNER: owner_id, SOURCE_ID: label_value(source_id)}


def is_ours(metadata: Mapping[str, object], owner_id: str) -> bool:
    """Tell whether these metadata carry our marks with this owner_id."""
    return metadata.get(MANAGED_BY) == US and metadata.get(SYNC_OWNER) == owner_id


def is_adoptable(metadata: Mapping[str, object]) -> bool:
    """Tell whether a customer carries no owner's marks at all; one of another owner is never taken over."""
    return MANAGED_BY not in metadata and SYNC_OWNER not in metadata


def owner_of(customer: ObservedCustomer) -> str:
    """Return how messages call the owner of a customer that is not ours."""
    if customer.metadata.get(MANAGED_BY) == US:
        return f"sync-owner {customer.metadata.get(SYNC_OWNER)!r}"
    if customer.metadata.get(MANAGED_BY):
        return f"{customer.metadata[MANAGED_BY]!r}"
    return "someone else (it has no owner marks)"


def may_write_subject(subject: ObservedSubject, owner_id: str) -> bool:
    """Tell whether a subject entity may be written: it is ours, or nobody has written anything into it.

    The second half is for entities that the server made by itself for a customer of ours.
    """
    if is_ours(subject.metadata, owner_id):
        return True
    if subject.display_name not in (None, "", subject.key):
        return False
    made_by_server = subject.metadata.get("createdBy") == _PROVISIONER
    return not subject.metadata or (made_by_server and set(subject.metadata) <= _PROVISIONER_KEYS)
