"""Test double of Konnect on a real HTTP server: paged lists of consumers, applications, registrations.

If the specifications are available, it checks each request and each answer against them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.specs import spec
from tests.syncd.servers import Answer, Asked

PORTAL = "11111111-1111-4111-8111-111111111111"
PLANE = "22222222-2222-4222-8222-222222222222"
DEVELOPER = "33333333-3333-4333-8333-333333333333"

Entry = dict[str, object]


def uid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


def moment(number: int) -> str:
    return f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000Z"


def application(number: int, *, owner: tuple[str, str] | None = ("developer", DEVELOPER)) -> Entry:
    name = f"app-{number}"
    shown: Entry = {
        "id": uid(name),
        "created_at": moment(number),
        "updated_at": moment(number),
        "name": name,
        "description": None,
        "labels": {},
        "portal": {"id": PORTAL},
        "registration_count": 1,
        "auth_strategy": {
            "id": uid("auth"),
            "name": "key",
            "credential_type": "key_auth",
            "key_names": ["apikey"],
        },
    }
    return shown | ({"owner": {"type": owner[0], "id": owner[1]}} if owner else {})


def registration(number: int, application: str, consumer: str | None = None, **fields: object) -> Entry:
    shown: Entry = {
        "id": uid(f"registration-{number}"),
        "created_at": moment(number),
        "updated_at": moment(number),
        "status": "approved",
        "api": {"id": uid("api"), "name": "api", "version": None, "entity_type": "api"},
        "application": {"id": uid(application), "name": application},
    }
    if consumer:
        mapped = {"id": uid(consumer), "username": consumer, "control_plane_id": PLANE, **fields}
        shown["consumer"] = mapped
    return shown


def consumer(name: str, **fields: object) -> Entry:
    return {"id": uid(name), "username": name, "created_at": 1, "updated_at": 1, "tags": [], **fields}


@dataclass
class Konnect:
    """`page` is the maximum page size; `before` may change the lists, or answer instead."""

    applications: list[Entry] = field(default_factory=list)
    registrations: list[Entry] = field(default_factory=list)
    consumers: list[Entry] = field(default_factory=list)
    plugins: list[Entry] = field(default_factory=list)
    page: int = 2
    before: Callable[[Konnect, Asked], Answer | None] = lambda _konnect, _asked: None

    def __call__(self, asked: Asked) -> Answer:
        name = (
            "konnect-portal-management-v3"
            if asked.path.startswith("/v3")
            else "konnect-control-planes-config-v2"
        )
        document, operation = spec(name), None
        if document:
            path = asked.path[len("/v3") :]
            operation = document.check_request(asked.method, path, list(asked.query.items()), asked.body)
        scripted = self.before(self, asked)
        answer = scripted or self._answer(asked)
        if document and operation and not scripted:
            document.check_answer(operation, 200, answer.body, asked.path)
        return answer

    def _answer(self, asked: Asked) -> Answer:
        last = asked.path.rpartition("/")[2]
        if last in {"consumers", "plugins"}:
            return self._by_offset(self.consumers if last == "consumers" else self.plugins, asked)
        listed = self.applications if last == "applications" else self.registrations
        size = min(int(asked.query["page[size]"]), self.page)
        number = int(asked.query["page[number]"])
        shown = listed[(number - 1) * size : number * size]
        return Answer(
            {"data": shown, "meta": {"page": {"number": number, "size": size, "total": len(listed)}}}
        )

    def _by_offset(self, listed: list[Entry], asked: Asked) -> Answer:
        """Page by primary key, as a database does: an offset is the last id that was shown."""
        after = asked.query.get("offset", "")
        rest = sorted(
            (entry for entry in listed if str(entry["id"]) > after), key=lambda entry: str(entry["id"])
        )
        shown = rest[: self.page]
        if len(rest) <= self.page:
            return Answer({"data": shown})
        offset = str(shown[-1]["id"])
        return Answer({"data": shown, "next": f"{asked.path}?offset={offset}", "offset": offset})
