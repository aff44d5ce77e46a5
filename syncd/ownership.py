"""Whose is it? The marks that say so, and the label rules that they keep.

We own a customer when its metadata carry both our name and our `owner_id`; a customer of another
owner_id is as foreign as one without marks. The marks are valid under the label rules of the v3
API too, so that a v1 customer keeps its owner when it is read through v3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from syncd.model import ObservedCustomer, ObservedSubject

MANAGED_BY = "managed-by"
SYNC_OWNER = "sync-owner"
SOURCE_ID = "source-id"
US = "kong-openmeter"
RESERVED_KEYS = frozenset({MANAGED_BY, SYNC_OWNER, SOURCE_ID})

# Narrower than the specification (v3 schema Labels: [A-Za-z0-9._-], 1-63): the server's own check
# also refuses "a--b" and mixed separators, so only single dashes between alphanumerics are safe.
_SAFE_LABEL = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")
_MAX_LABEL = 63

# openmeter/subject/service/hooks/customersubject.go: the server makes a subject entity for each
# subject key of a customer and notes itself and the customer in the metadata.
_PROVISIONER_KEYS = frozenset({"createdBy", "customerId"})
_PROVISIONER = "subject.provisioner"


def label_value(text: str) -> str:
    """Return `text` where it is a valid label value, else a stable stand-in: ``sha256-<48 hex>``."""
    if len(text) <= _MAX_LABEL and _SAFE_LABEL.fullmatch(text):
        return text
    return f"sha256-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"


def is_label_value(text: str) -> bool:
    """Tell whether `text` may stand in a label as it is."""
    return label_value(text) == text


def marks(owner_id: str, source_id: str) -> dict[str, str]:
    """Return the metadata that make an entity ours; `source_id` is encoded where a label cannot hold it."""
    return {MANAGED_BY: US, SYNC_OWNER: owner_id, SOURCE_ID: label_value(source_id)}


def is_ours(metadata: Mapping[str, object], owner_id: str) -> bool:
    """Tell whether these metadata carry our marks with this owner_id."""
    return metadata.get(MANAGED_BY) == US and metadata.get(SYNC_OWNER) == owner_id


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
