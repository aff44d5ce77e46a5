"""The metering API of the model: a sandbox that fails, lags and lies as asked, and notes what writes did.

Faults that a server, a proxy or a network can cause, except those that no client could notice:

- A by-id read is late only for a customer that no person has edited meanwhile: the API has no ETag, so an
  edit that is written back onto a late document is lost, whoever writes it. For the same reason people do
  not edit between syncd's read of a customer and the write that follows it at once; they do edit between
  that write and its repetition.
- A by-id read misses writes of earlier runs only if the list of this run shows them: if all reads of a
  customer show the same old state, nothing tells that it is old.
- Lists of subject entities are late under the same condition, because these have no other read, and people
  do not edit them between that list and the writes that follow it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

from syncd.core.ownership import is_managed
from tests.syncd.model.people import Creates, edit
from tests.syncd.model.sandboxed import Reply, Sandboxed
from tests.syncd.model.truth import OWNER, Step, Truth, read_truth, step_between

Kind = Literal["create", "write", "one", "part", "list", "other"]
"""Kinds of requests: `one` reads a customer by id or key, `part` something that depends on one."""

FAULTS = (
    "500",
    "502",
    "503",
    "429",
    "timeout",
    "cut",
    "garbage",
    "acted-500",
    "acted-503",
    "acted-409",
    "acted-timeout",
    "acted-cut",
    "acted-garbage",
    "someone-else",
    "late-1",
    "late-2",
    "late-3",
)

RACES = ("taken-key", "taken-key-late", "taken-subject", "500-edit", "500-disown", "acted-500-edit")
"""What a person does right at a request.

`taken-*`: just before it, a person creates a customer with the key or a subject that it is about, so that a
creation gets a plain 409, or takes over the customer with that key; `late`: the next read of a customer does
not show that yet. `*-edit`, `*-disown`: the request fails, and before it is repeated, a person edits or takes
over its customer.
"""


class CutError(Exception):
    """The connection ends without an answer."""


class SilenceError(Exception):
    """No answer comes in time."""


@dataclass(frozen=True)
class Fault:
    """Spoils the request with this number, from 0, among those of a kind in one run.

    `key` are reads by key, `delete` deletions of customers.
    """

    among: Kind | Literal["any", "key", "delete"]
    number: int
    what: str


@dataclass(frozen=True)
class Write:
    """A write of syncd that the server accepted; `begun` is what the history said then."""

    request: str
    body: str
    step: Step
    before: Truth
    begun: Sequence[dict[str, Any]]
    distrusted: bool
    """Whether syncd had seen an answer about someone else before."""
    foreign: frozenset[str]
    """Keys whose customer, as syncd read it last, is not managed."""


_NO_METERS = Reply(404, b'{"title": "Not Found", "status": 404, "detail": "meter not found"}')

Interruption = tuple[int, Callable[[], None]]
"""What a person does before the request with this number."""


@dataclass
class MeteringApi:
    """Answers requests of both dialects; `begin` starts what is counted for one run."""

    sandbox: Sandboxed
    now: Callable[[], datetime]
    begun: Callable[[], Sequence[dict[str, Any]]] = lambda: ()
    lists_late: int = 0
    reads_late: int = 0
    faults: Sequence[Fault] = ()
    interruptions: list[Interruption] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lied: bool = False
    """Whether an answer of this run was about someone else than was asked for."""
    hurt: bool = False
    """Whether a fault has spoilt a request of this run."""

    def __post_init__(self) -> None:
        self._edited: dict[str, int] = {}
        self._foreign: set[str] = set()
        self._next_read_late = 0
        self._entities_edited = 0
        self._began, self._listed_late = 0, False
        self._last: Kind = "other"

    # The test's side

    def begin(self, faults: Sequence[Fault] = (), interruptions: Sequence[Interruption] = ()) -> None:
        self.faults, self.interruptions = faults, sorted(interruptions, key=lambda one: one[0])
        self.writes, self.seen, self.lied, self.hurt = [], Counter(), False, False
        self._began, self._listed_late = self.sandbox.database.version, False
        self._foreign, self._next_read_late = set(), 0

    def catch_up(self) -> None:
        """End all lags."""
        self.sandbox.database.catch_up()

    def truth(self) -> Truth:
        return read_truth(self.sandbox.database)

    def by_person(self, act: Callable[[Sandboxed], object]) -> None:
        """Do what a person does."""
        before = self.truth()
        act(self.sandbox)
        step = step_between(before, self.truth())
        version = self.sandbox.database.version
        self._edited |= {had.id: version for had, _ in step.customers if had is not None}
        if step.entities:
            self._entities_edited = version

    # The server's side

    def answer(self, method: str, target: str, body: bytes) -> Reply:
        """Answer one request of syncd; raises CutError or SilenceError instead of an answer."""
        kind = kind_of(method, target)
        is_bound = kind == "part" or (kind == "write" and self._last in ("one", "part"))
        is_bound |= method == "POST" and target.startswith("/api/v1/subjects")
        while not is_bound and self._is_interrupted():
            self.interruptions.pop(0)[1]()
        self._last = kind
        what = self._fault(kind, method, target)
        if what is None:
            return self._dated(self._pass(kind, method, target, body))
        self.hurt = True
        answer = self._raced if what in RACES else self._spoilt
        return self._dated(answer(what, kind, method, target, body))

    def _is_interrupted(self) -> bool:
        return bool(self.interruptions) and self.interruptions[0][0] <= self.seen["any"]

    def _fault(self, kind: Kind, method: str, target: str) -> str | None:
        kinds = ["any", kind]
        if kind == "one" and _key_asked(target):
            kinds.append("key")
        if method == "DELETE" and "/customers/" in target:
            kinds.append("delete")
        numbers = {name: self.seen[name] for name in kinds}
        self.seen.update(numbers.keys())
        return next((one.what for one in self.faults if numbers.get(one.among) == one.number), None)

    def _dated(self, reply: Reply) -> Reply:
        date = format_datetime(self.now(), usegmt=True).encode()
        return Reply(reply.status, reply.body, {**reply.headers, b"date": date})

    def _pass(self, kind: Kind, method: str, target: str, body: bytes, late: int | None = None) -> Reply:
        if "/meters" in target:
            return _NO_METERS  # figures are only a note, and to count nothing takes a third of the time
        if kind in ("create", "write"):
            return self._write(method, target, body)
        database = self.sandbox.database
        database.behind = late if late is not None else self._lag(kind)
        try:
            if database.behind and self._must_be_fresh(kind, target, database.version_read()):
                database.behind = 0
            reply = self.sandbox.call(method, target, body)
        finally:
            database.behind = 0
        if kind == "one":
            self._note_owner(reply)
        return reply

    def _note_owner(self, reply: Reply) -> None:
        found = reply.document if reply.ok else {}
        for one in found.get("data", [found]):
            is_ours = is_managed(one.get("metadata") or one.get("labels") or {}, OWNER)
            (self._foreign.discard if is_ours else self._foreign.add)(one.get("key"))

    def _lag(self, kind: Kind) -> int:
        if kind == "one" and self._next_read_late:
            late, self._next_read_late = self._next_read_late, 0
            return late
        return {"list": self.lists_late, "one": self.reads_late, "part": self.reads_late}.get(kind, 0)

    def _must_be_fresh(self, kind: Kind, target: str, version: int) -> bool:
        if kind == "list":
            self._listed_late |= version < self._began
            return target.startswith("/api/v1/subjects") and self._entities_edited > version
        if self._listed_late and version < self._began:
            return True
        return any(edited > version for name, edited in self._edited.items() if self._names(target, name))

    def _names(self, target: str, identity: str) -> bool:
        one = self.truth().customers.get(identity)
        return identity in target or bool(one and one.key and one.key in unquote(target))

    def _write(self, method: str, target: str, body: bytes) -> Reply:
        before, begun, distrusted = self.truth(), list(self.begun()), self.lied
        reply = self.sandbox.call(method, target, body)
        if reply.ok:
            step = step_between(before, self.truth())
            request = f"{method} {unquote(target)}"
            foreign = frozenset(self._foreign)
            self.writes.append(Write(request, body.decode(), step, before, begun, distrusted, foreign))
        return reply

    def _raced(self, what: str, kind: Kind, method: str, target: str, body: bytes) -> Reply:
        if what.startswith("taken-"):
            if (taken := self._taken(what, kind, target, body)) is not None:
                self.by_person(taken)
                self._next_read_late = int(what.endswith("late"))
            return self._pass(kind, method, target, body)
        acted = self._pass(kind, method, target, body) if what.startswith("acted-") else None
        created = acted.document["id"] if acted and acted.ok and kind == "create" else None
        identity = created or target.partition("?")[0].rpartition("/")[2]
        deed = "disown" if what.endswith("disown") else "describe"
        self.by_person(lambda sandbox: edit(sandbox, identity, deed))
        return self._spoilt("500", kind, method, target, body)

    def _taken(self, what: str, kind: Kind, target: str, body: bytes) -> Callable[[Sandboxed], object] | None:
        """Return what a person does so that this request finds its key or subject taken."""
        document = json.loads(body) if body else None
        named = document if isinstance(document, dict) else {}
        attribution = named.get("usageAttribution") or named.get("usage_attribution") or {}
        subjects = attribution.get("subjectKeys") or attribution.get("subject_keys") or []
        if what == "taken-subject":
            free = [subject for subject in subjects if not self.truth().payers(subject)]
            return Creates(f"by-hand-{self.sandbox.database.version}", (free[0],)) if free else None
        key = named.get("key") if kind == "create" else _key_asked(target) if kind == "one" else None
        if there := self.truth().by_key(key):
            return lambda sandbox: edit(sandbox, there.id, "disown")
        return Creates(key, ()) if key else None

    def _spoilt(self, what: str, kind: Kind, method: str, target: str, body: bytes) -> Reply:
        acted = self._pass(kind, method, target, body) if what.startswith("acted-") else None
        how = what.removeprefix("acted-")
        if how == "cut":
            raise CutError
        if how == "timeout":
            raise SilenceError
        if how == "garbage":
            return Reply(200, b"<html>welcome</html>", {b"content-type": b"text/html"})
        if how == "409" and kind != "create":
            return acted or self._pass(kind, method, target, body)
        if how.isdigit():
            problem = {"title": how, "status": int(how), "detail": "injected by the test"}
            headers = {b"retry-after": b"7"} if how == "429" else {}
            return Reply(int(how), json.dumps(problem).encode(), headers)
        if how.startswith("late-"):
            return self._pass(kind, method, target, body, late=int(how[-1]))
        return self._about_someone_else(kind, method, target, body)

    def _about_someone_else(self, kind: Kind, method: str, target: str, body: bytes) -> Reply:
        reply = self._pass(kind, method, target, body)
        if kind in ("list", "other") or method == "DELETE" or "subjects" in target.partition("?")[0]:
            return reply
        for other in self.truth().customers.values():
            swapped = self._swapped(kind, method, target, reply, other.id)
            if swapped is not None:
                self.lied = True
                return swapped
        return reply

    def _swapped(self, kind: Kind, method: str, target: str, reply: Reply, other: str) -> Reply | None:
        """Return the answer about the customer `other`; None if it is no other answer."""
        path, _, query = target.partition("?")
        base = path[: path.index("/customers") + len("/customers")] if "/customers" in path else ""
        asked = parse_qs(query)
        if kind == "part":
            return self._part_of_someone_else(path, asked, base, other)
        document = self.sandbox.call("GET", f"{base}/{other}").document
        if kind == "one" and "filter[key][eq]" in asked:
            if document.get("key") in asked["filter[key][eq]"]:
                return None
            page = {"number": 1, "size": 1000, "total": 1}
            return Reply(200, json.dumps({"data": [document], "meta": {"page": page}}).encode())
        there = reply.document if reply.ok else {}
        asked_for = (f"{base}/{other}", f"{base}/{document.get('key')}")
        if document["id"] == there.get("id") or unquote(path) in asked_for:
            return None
        return Reply(reply.status if reply.ok else 200, json.dumps(document).encode())

    def _part_of_someone_else(
        self, path: str, asked: dict[str, list[str]], base: str, other: str
    ) -> Reply | None:
        if path.endswith("/openmeter/subscriptions"):
            mine = asked["filter[customer_id][eq]"]
            found = self.sandbox.call("GET", f"{path}?{quote('filter[customer_id][eq]')}={other}")
            return found if other not in mine and found.document["data"] else None
        if path.endswith("/subscriptions") and base and f"/{other}/" not in path:
            found = self.sandbox.call("GET", f"{base}/{other}/subscriptions")
            return found if found.document["items"] else None
        return None


_ID = re.compile(r"\d{26}")


def _key_asked(target: str) -> str | None:
    """Return the key by which a request reads a customer."""
    path, _, query = target.partition("?")
    name = unquote(path.rpartition("/")[2])
    return parse_qs(query).get("filter[key][eq]", [None if _ID.fullmatch(name) else name])[0]


def kind_of(method: str, target: str) -> Kind:
    path, _, query = target.partition("?")
    if path.endswith("/query") or "/meters" in path:
        return "other"
    if method == "POST" and path.endswith("/customers"):
        return "create"
    if method != "GET":
        return "write"
    if path.endswith(("/customers", "/subjects")):
        return "one" if "filter%5Bkey%5D" in query else "list"
    if path.endswith("/openmeter/subscriptions"):
        return "part" if "customer_id" in query else "list"
    if "/customers/" in path:
        return "part" if "/" in path.partition("/customers/")[2] else "one"
    return "part" if path.endswith("/invoices") else "other"
