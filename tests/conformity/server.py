"""The server under test, read and cleaned up without syncd's clients, whose faults would hide themselves.

Everything that a run creates is new and has the run's prefix. All else belongs to somebody else: it is never
written or deleted, and a picture of it before the run is compared with one after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from syncd.config.settings import Dialect

PAGE = 1000
_ON_ITS_WAY = 0.3
V3_PATHS = ("/api/v3/openmeter", "/v3/openmeter")
"""A self-hosted OpenMeter's, Konnect's."""


class Unusable(Exception):
    """The server answers in none of the dialects that were asked for."""


@dataclass
class Server:
    """A server and the run that uses it. `v3_path` is None where it does not speak openmeter-v3."""

    url: str
    prefix: str
    http: httpx.Client
    wanted: Collection[Dialect] = ("openmeter-v1", "openmeter-v3")
    """The dialects that scenarios are run in; what they set up may use another one that the server speaks."""
    v1: bool = True
    v3_path: str | None = None
    foreign: Mapping[str, str] = field(default_factory=dict)
    """What was there before the run: customers and subject entities, and how they looked."""
    plans: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    meters: list[str] = field(default_factory=list)
    """Ids of what scenarios created beside customers, which has to go at the end."""

    @property
    def spoken(self) -> list[Dialect]:
        """Return the dialects that it speaks."""
        found: list[Dialect] = []
        if self.v1:
            found.append("openmeter-v1")
        if self.v3_path:
            found.append("openmeter-v3")
        return found

    @property
    def dialects(self) -> list[Dialect]:
        """Return the dialects to run the scenarios in."""
        return [dialect for dialect in self.spoken if dialect in self.wanted]

    def metering_url(self, dialect: Dialect) -> str:
        """Return the `metering.url` for syncd."""
        if dialect == "openmeter-v1":
            return self.url
        assert self.v3_path is not None
        return self.url + self.v3_path.removesuffix("/openmeter")

    def events_url(self, dialect: Dialect) -> str:
        """Return the `ingest_endpoint` for the plugin."""
        return (
            f"{self.url}/api/v1/events" if dialect == "openmeter-v1" else f"{self.url}{self.v3_path}/events"
        )

    def ask(self, method: str, path: str, body: object = None) -> httpx.Response:
        """Send a request to a path below the URL."""
        return self.http.request(method, self.url + path, json=body)

    def made(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send a request that has to succeed, and return its answer."""
        answer = self.ask(method, path, body)
        if not answer.is_success:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        document: dict[str, Any] = answer.json() if answer.content else {}
        return document

    # Customers

    def customers(self) -> dict[str, dict[str, Any]]:
        """Return all customers by id."""
        return {customer["id"]: customer for customer in self._customers()}

    def _customers(self) -> Iterator[dict[str, Any]]:
        number, items = 1, "items" if self.v1 else "data"
        while True:
            if self.v1:
                path = f"/api/v1/customers?page={number}&pageSize={PAGE}&orderBy=createdAt"
            else:
                path = f"{self.v3_path}/customers?page[number]={number}&page[size]={PAGE}&sort=created_at"
            page = self.made("GET", path)[items]
            yield from page
            if len(page) < PAGE:
                return
            number += 1

    def is_ours(self, customer: Mapping[str, Any]) -> bool:
        """Return whether this run, or syncd for it, created a customer."""
        if f"customer {customer['id']}" in self.foreign:
            return False  # also if syncd put one of our subjects on it
        metadata = customer.get("metadata") or customer.get("labels") or {}
        texts = [str(customer.get("key", "")), str(metadata.get("sync-owner", "")), *subjects_of(customer)]
        return any(text.startswith(self.prefix) for text in texts)

    def ours(self) -> dict[str, dict[str, Any]]:
        """Return this run's customers by id."""
        return {identity: each for identity, each in self.customers().items() if self.is_ours(each)}

    def delete_customer(self, identity: str) -> str | None:
        """Delete a customer; return why not, None if it is gone."""
        path = "/api/v1" if self.v1 else self.v3_path
        answer = self.ask("DELETE", f"{path}/customers/{identity}")
        if answer.is_success or answer.status_code in (404, 410, 412):
            return None
        return reason(answer)

    # Subject entities (v1)

    def entities(self) -> dict[str, dict[str, Any]]:
        """Return all subject entities by key; empty where the server has none."""
        answer = self.ask("GET", "/api/v1/subjects") if self.v1 else None
        return {entity["key"]: entity for entity in answer.json()} if answer and answer.is_success else {}

    def picture(self) -> dict[str, str]:
        """Return how all customers and subject entities look."""
        found = {f"customer {identity}": each for identity, each in self.customers().items()}
        found |= {f"subject entity {key}": each for key, each in self.entities().items()}
        return {name: json.dumps(each, sort_keys=True) for name, each in found.items()}

    def touched(self) -> list[str]:
        """Return what belongs to somebody else and looks otherwise than before the run."""
        now = self.picture()
        return [
            f"{name}: {'was deleted' if name not in now else f'{before} became {now[name]}'}"
            for name, before in self.foreign.items()
            if now.get(name) != before
        ]

    # Cleaning up

    def clean(self) -> list[str]:
        """Delete what the run created, and say what is left."""
        ours, left = self._clean_customers()
        for key, entity in self.entities().items():
            owner = (entity.get("metadata") or {}).get(
                "customerId"
            )  # as OpenMeter's own provisioner writes it
            if f"subject entity {key}" in self.foreign or not (self.prefix in key or owner in ours):
                continue
            # Encoded throughout: OpenMeter decodes the shortest encoding of a path twice.
            encoded = "".join(f"%{byte:02X}" for byte in key.encode())
            if not (answer := self.ask("DELETE", f"/api/v1/subjects/{encoded}")).is_success:
                left.append(f"subject entity {key}: {reason(answer)}")
        for path in self.plans:
            self.ask("POST", f"/api/v1/plans/{path}/archive")
            left += self._deleted(f"/api/v1/plans/{path}", "plan")
        for path in self.features:
            left += self._deleted(f"/api/v1/features/{path}", "feature")
        for path in self.meters:
            base = "/api/v1" if self.v1 else self.v3_path
            left += self._deleted(f"{base}/meters/{path}", "meter")
        return left

    def _clean_customers(self) -> tuple[set[str], list[str]]:
        """Delete the run's customers; return their ids, and what is left.

        Again until there are no new ones: a request of an interrupted scenario may still be on its way.
        """
        seen: set[str] = set()
        left: list[str] = []
        while new := {identity: each for identity, each in self.ours().items() if identity not in seen}:
            for identity, customer in new.items():
                if self.delete_customer(identity) is None:
                    continue
                self._withdraw(identity)
                if why := self.delete_customer(identity):
                    left.append(f"customer {customer.get('key')} ({identity}): {why}")
            seen |= set(new)
            time.sleep(_ON_ITS_WAY)
        return seen, left

    def stays(self) -> list[str]:
        """Return what no API deletes."""
        return [
            f"events whose subject or source has {self.prefix}; nobody is billed for them",
            "the deleted customers themselves: OpenMeter keeps them with the date of their deletion",
        ]

    def _withdraw(self, identity: str) -> None:
        """End what forbids the deletion of a customer, as far as it can be ended."""
        if not self.v1:
            return
        listed = self.ask("GET", f"/api/v1/customers/{identity}/subscriptions?page=1&pageSize=100")
        for subscription in listed.json().get("items", []) if listed.is_success else ():
            path = f"/api/v1/subscriptions/{subscription['id']}"
            if not self.ask("POST", f"{path}/cancel", {"timing": "immediate"}).is_success:
                self.ask("DELETE", path)
        entitled = self.ask("GET", f"/api/v2/customers/{identity}/entitlements")
        for entitlement in entitled.json().get("items", []) if entitled.is_success else ():
            self.ask("DELETE", f"/api/v2/customers/{identity}/entitlements/{entitlement['id']}")
        # A gathering invoice ends by becoming a real one, which the sandbox app of OpenMeter pays at once.
        self.ask("POST", "/api/v1/billing/invoices/invoice", {"customerId": identity})
        # The sandbox has these on paths of its own, and no invoice of it ends by itself.
        for part in ("subscriptions", "entitlements", "invoices"):
            self.ask("DELETE", f"/sandbox/v1/customers/{identity}/{part}")

    def _deleted(self, path: str, what: str) -> list[str]:
        answer = self.ask("DELETE", path)
        gone = answer.is_success or answer.status_code in (404, 410, 412)
        return [] if gone else [f"{what} {path.rpartition('/')[2]}: {reason(answer)}"]


def subjects_of(customer: Mapping[str, Any]) -> list[str]:
    """Return the subject keys of a customer of either dialect."""
    attribution = customer.get("usageAttribution") or customer.get("usage_attribution") or {}
    return list(attribution.get("subjectKeys") or attribution.get("subject_keys") or ())


def reason(answer: httpx.Response) -> str:
    """Return status and reason of a refusal, in one line."""
    try:
        document = answer.json()
    except ValueError:
        document = {}
    said = document.get("detail") or document.get("title") or answer.text
    return f"{answer.status_code} {' '.join(str(said).split())[:200]}"


def reached(url: str, prefix: str, http: httpx.Client, wanted: set[Dialect]) -> Server:
    """Return the server with the wanted dialects that it speaks; raises Unusable."""
    server = Server(url.rstrip("/"), prefix, http, wanted, v1=False)
    refusals: list[str] = []
    for path in ("/api/v1", *V3_PATHS):
        try:
            answer = server.ask("GET", f"{path}/customers")
        except httpx.HTTPError as error:
            raise Unusable(f"{url} does not answer: {error}") from None
        if not answer.is_success:
            refusals.append(f"GET {path}/customers: {reason(answer)}")
        elif path == "/api/v1":
            server.v1 = True
        else:
            server.v3_path = server.v3_path or path
    if not server.dialects:
        raise Unusable(f"{url} speaks no dialect that was asked for. {'; '.join(refusals)}")
    return server
