"""What the metering API really holds, read from its database: neither late nor through any client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from syncd.core.ownership import is_managed
from tests.syncd.model.sandboxed import LaggingDatabase

OWNER = "default"


@dataclass(frozen=True)
class Customer:
    """A customer that is not deleted; `rest` are the fields that syncd never writes to after a creation."""

    id: str
    key: str | None
    name: str
    subjects: frozenset[str]
    metadata: Mapping[str, str]
    rest: Mapping[str, Any]
    subscribed: bool
    entitled: bool

    @property
    def managed(self) -> bool:
        return is_managed(self.metadata, OWNER)

    @property
    def names(self) -> frozenset[str]:
        """The subjects whose usage it pays for."""
        return self.subjects | ({self.key} if self.key else set())


@dataclass(frozen=True)
class Entity:
    key: str
    name: str | None
    metadata: Mapping[str, Any]

    @property
    def managed(self) -> bool:
        return is_managed(self.metadata, OWNER)


@dataclass(frozen=True)
class Truth:
    customers: Mapping[str, Customer]
    entities: Mapping[str, Entity]

    def payers(self, subject: str) -> list[Customer]:
        return [one for one in self.customers.values() if subject in one.names]

    def by_key(self, key: str | None) -> Customer | None:
        return next((one for one in self.customers.values() if key and one.key == key), None)


def read_truth(database: LaggingDatabase) -> Truth:
    behind, database.behind = database.behind, 0
    try:
        with database.reading() as connection:
            rows = connection.execute(
                "SELECT id, document FROM customers WHERE deleted_at IS NULL ORDER BY id"
            )
            documents = {row["id"]: json.loads(row["document"]) for row in rows}
            running = "SELECT DISTINCT customer_id FROM subscriptions WHERE active_to IS NULL"
            subscribed = {row[0] for row in connection.execute(running)}
            entitled = {row[0] for row in connection.execute("SELECT customer_id FROM entitlements")}
            subjects = connection.execute("SELECT key, document FROM subjects ORDER BY key").fetchall()
    finally:
        database.behind = behind
    entities = [_entity(row["key"], json.loads(row["document"])) for row in subjects]
    return Truth(
        {name: _customer(name, it, name in subscribed, name in entitled) for name, it in documents.items()},
        {entity.key: entity for entity in entities},
    )


_WRITTEN = {"key", "name", "metadata", "usageAttribution"}


def _customer(identity: str, document: Mapping[str, Any], subscribed: bool, entitled: bool) -> Customer:
    return Customer(
        identity,
        document.get("key"),
        document["name"],
        frozenset(document.get("usageAttribution", {}).get("subjectKeys", ())),
        document.get("metadata") or {},
        {name: value for name, value in document.items() if name not in _WRITTEN},
        subscribed,
        entitled,
    )


def _entity(key: str, document: Mapping[str, Any]) -> Entity:
    return Entity(key, document.get("displayName"), document.get("metadata") or {})


@dataclass(frozen=True)
class Step:
    """What one write changed: customers and entities before and after, None where there is none."""

    customers: tuple[tuple[Customer | None, Customer | None], ...]
    entities: tuple[tuple[Entity | None, Entity | None], ...]

    def __bool__(self) -> bool:
        return bool(self.customers or self.entities)


def step_between(before: Truth, after: Truth) -> Step:
    return Step(
        tuple(_changed(before.customers, after.customers)), tuple(_changed(before.entities, after.entities))
    )


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    names: Iterable[str] = sorted({*before, *after})
    for name in names:
        if before.get(name) != after.get(name):
            yield before.get(name), after.get(name)
