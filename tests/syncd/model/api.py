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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

from tests.syncd.model.sandboxed import Reply, Sandboxed
from tests.syncd.model.truth import Step, Truth, read_truth, step_between

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


class CutError(Exception):
    """The connection ends without an answer."""


class SilenceError(Exception):
    """No answer comes in time."""


@dataclass(frozen=True)
class Fault:
    """Spoils the request with this number, from 0, among those of a kind in one run."""

    among: Kind | Literal["any"]
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
        self._entities_edited = 0
        self._began, self._listed_late = 0, False
        self._last: Kind = "other"

    # The test's side

    def begin(self, faults: Sequence[Fault] = (), interruptions: Sequence[Interruption] = ()) -> None:
        self.faults, self.interruptions = faults, sorted(interruptions, key=lambda one: one[0])
        self.writes, self.seen, self.lied, self.hurt = [], Counter(), False, False
        self._began, self._listed_late = self.sandbox.database.version, False

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
        what = self._fault(kind)
        if what is None:
            return self._dated(self._pass(kind, method, target, body))
        self.hurt = True
        return self._dated(self._spoilt(what, kind, method, target, body))

    def _is_interrupted(self) -> bool:
        return bool(self.interruptions) and self.interruptions[0][0] <= self.seen["any"]

    def _fault(self, kind: Kind) -> str | None:
        numbers = {"any": self.seen["any"], kind: self.seen[kind]}
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
            return self.sandbox.call(method, target, body)
        finally:
            database.behind = 0

    def _lag(self, kind: Kind) -> int:
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
            self.writes.append(Write(request, body.decode(), step, before, begun, distrusted))
        return reply

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
        if document["id"] == there.get("id") or unquote(path) == f"{base}/{document.get('key')}":
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
