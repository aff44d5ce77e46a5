"""What people do in the metering API, with the v1 API as the page of OpenMeter does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from tests.syncd.model.sandboxed import Reply, Sandboxed
from tests.syncd.model.truth import read_truth

SUBJECTS = [f"consumer:{number}" for number in range(1, 6)]
GROUPS = ["acme", "globex"]
_PUT = ("key", "name", "description", "metadata", "usageAttribution", "primaryEmail", "currency")


@dataclass(frozen=True)
class Creates:
    key: str | None
    subjects: tuple[str, ...]

    def __call__(self, sandbox: Sandboxed) -> None:
        body = {
            "name": "By hand",
            "key": self.key,
            "description": "a person's",
            "metadata": {"crm": "1"},
            "usageAttribution": {"subjectKeys": list(self.subjects)},
        }
        _send(sandbox, "POST", "/api/v1/customers", {k: v for k, v in body.items() if v is not None})


@dataclass(frozen=True)
class Edits:
    """Changes one field of a customer."""

    index: int
    what: str

    def __call__(self, sandbox: Sandboxed) -> None:
        if (identity := _pick(sandbox, self.index)) is not None:
            edit(sandbox, identity, self.what)


def edit(sandbox: Sandboxed, identity: str, what: str) -> None:
    """Change one field of a customer, if it is there."""
    path = f"/api/v1/customers/{identity}"
    reply = sandbox.call("GET", path)
    if not reply.ok or reply.document.get("deletedAt"):
        return
    there = reply.document
    body = {name: there[name] for name in _PUT if there.get(name) is not None}
    metadata = dict(body.get("metadata", {}))
    keys = list(body.get("usageAttribution", {}).get("subjectKeys", []))
    match what.split(" "):
        case ["rename"]:
            body["name"] = "Renamed"
        case ["describe"]:
            body |= {"description": "edited", "primaryEmail": "finance@example.org"}
        case ["tag"]:
            metadata["crm"] = "7"
        case ["disown"]:
            metadata["sync-owner"] = "someone"
        case ["release"]:
            for name in ("managed-by", "sync-owner"):
                metadata.pop(name, None)
        case ["attach", subject]:
            keys.append(subject)
        case ["detach", subject]:
            keys = [key for key in keys if key != subject]
    body["metadata"] = metadata
    if keys or "usageAttribution" in body:
        body["usageAttribution"] = {"subjectKeys": sorted(set(keys))}
    _send(sandbox, "PUT", path, body)


@dataclass(frozen=True)
class Sells:
    """Gives a customer a subscription or an entitlement, or ends it."""

    index: int
    what: str
    ends: bool

    def __call__(self, sandbox: Sandboxed) -> None:
        if (identity := _pick(sandbox, self.index)) is not None:
            method = "DELETE" if self.ends else "POST"
            sandbox.call(method, f"/sandbox/v1/customers/{identity}/{self.what}")


@dataclass(frozen=True)
class Deletes:
    index: int

    def __call__(self, sandbox: Sandboxed) -> None:
        if (identity := _pick(sandbox, self.index)) is not None:
            sandbox.call("DELETE", f"/api/v1/customers/{identity}")


@dataclass(frozen=True)
class EditsEntity:
    subject: str

    def __call__(self, sandbox: Sandboxed) -> None:
        entity = read_truth(sandbox.database).entities.get(self.subject)
        metadata = dict(entity.metadata) if entity else {}
        body = [{"key": self.subject, "displayName": "By hand", "metadata": {**metadata, "crm": "7"}}]
        _send(sandbox, "POST", "/api/v1/subjects", body)


@dataclass(frozen=True)
class DeletesEntity:
    subject: str

    def __call__(self, sandbox: Sandboxed) -> None:
        sandbox.call("DELETE", f"/api/v1/subjects/{quote(self.subject, safe='')}")


Deed = Callable[[Sandboxed], None]

_indexes = st.integers(0, 5)
_edits = ["rename", "describe", "tag", "disown", "release", "attach mobile", "detach mobile"]
_edits += [f"{verb} {subject}" for verb in ("attach", "detach") for subject in SUBJECTS[:3]]
deeds: st.SearchStrategy[Deed] = st.one_of(
    st.builds(Edits, _indexes, st.sampled_from(_edits)),
    st.builds(
        Creates,
        st.sampled_from([*GROUPS, "consumer-1", "by-hand"]),
        st.lists(st.sampled_from([*SUBJECTS[:3], "mobile"]), max_size=2, unique=True).map(tuple),
    ),
    st.builds(Sells, _indexes, st.sampled_from(["subscriptions", "entitlements"]), st.booleans()),
    st.builds(Deletes, _indexes),
    st.builds(EditsEntity, st.sampled_from(SUBJECTS[:3])),
    st.builds(DeletesEntity, st.sampled_from(SUBJECTS[:3])),
)


def _pick(sandbox: Sandboxed, index: int) -> str | None:
    there = list(read_truth(sandbox.database).customers)
    return there[index % len(there)] if there else None


def _send(sandbox: Sandboxed, method: str, path: str, body: Any) -> Reply:
    return sandbox.call(method, path, json.dumps(body).encode())
