"""The Admin API of the model's Kong, with a database: pages of two consumers, faults as asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs

from tests.syncd.model.api import CutError
from tests.syncd.model.sandboxed import Reply

KongFault = Literal["none", "empty", "shorter", "500", "cut", "truncated"]
KONG_FAULTS: tuple[KongFault, ...] = ("none", "empty", "shorter", "500", "cut", "truncated")
"""`empty` and `shorter` lists look whole; `truncated` is an answer that ends in the middle."""
_PAGE = 2


@dataclass(frozen=True)
class Consumer:
    id: str
    username: str
    group: str | None

    @property
    def subject(self) -> str:
        return f"consumer:{self.id}"

    def document(self) -> dict[str, object]:
        return {
            "id": self.id,
            "username": self.username,
            "tags": [f"customer:{self.group}"] if self.group else None,
        }


News = Consumer | str
"""A consumer that is added or changed, or the id of one that is removed."""


@dataclass
class Kong:
    consumers: dict[str, Consumer] = field(default_factory=dict)
    fault: KongFault = "none"
    told: Mapping[str, Consumer] = field(default_factory=dict)
    """The consumers of the last whole list: all that syncd knows."""

    def change(self, news: Iterable[News]) -> None:
        for one in news:
            if isinstance(one, Consumer):
                self.consumers[one.id] = one
            else:
                self.consumers.pop(one, None)

    def answer(self, _method: str, target: str, _body: bytes) -> Reply:
        path, _, query = target.partition("?")
        if path == "/status":
            return self._json({"server": {}, "database": {"reachable": True}})
        if path == "/plugins":
            return self._json({"data": [], "next": None})
        if self.fault == "cut":
            raise CutError
        if self.fault == "500":
            return Reply(500, b"{}")
        return self._page(int(parse_qs(query).get("offset", ["0"])[0]))

    def _page(self, start: int) -> Reply:
        listed = [self.consumers[name] for name in sorted(self.consumers)]
        listed = {"empty": [], "shorter": listed[:-1]}.get(self.fault, listed)
        page = listed[start : start + _PAGE]
        last = start + _PAGE >= len(listed)
        if last:
            self.told = {one.id: one for one in listed}
        document: dict[str, object] = {"data": [one.document() for one in page], "next": None}
        if not last:
            document |= {"offset": str(start + _PAGE), "next": f"/consumers?offset={start + _PAGE}"}
        reply = self._json(document)
        return Reply(200, reply.body[:-9]) if self.fault == "truncated" and last else reply

    @staticmethod
    def _json(document: object) -> Reply:
        return Reply(200, json.dumps(document).encode(), {b"content-type": b"application/json"})
