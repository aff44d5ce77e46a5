"""Inspection of a customer before its deletion, and the deletion of customers and subject entities.

An inspection takes three to five requests, so only the few customers that a plan would delete are
inspected. OpenMeter refuses a deletion with an active subscription, an active entitlement or an invoice
that is not final (openmeter/{subscription,entitlement}/validators/customer, billing/validators/customer).
It does *not* refuse one with a scheduled subscription, credits, or an account with a payment app.

Deletions are separate from the other writes, so that few places can delete.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote

from syncd.core.errors import BlockedError, RefusedError
from syncd.core.model import CustomerDetails
from syncd.http.client import ApiClient, Params, expect_list, expect_object
from syncd.metering.base import Inspection

_API = "metering API"
_GONE = frozenset({404, 410, 412})
_PAGE = 100
_OPEN_INVOICE = ["gathering", "draft", "issuing"]


class ApiInspector:
    """Inspects customers through the metering API of either dialect."""

    def __init__(self, client: ApiClient, dialect: Literal["openmeter-v1", "openmeter-v3"]) -> None:
        self._client = client
        self._is_v3 = dialect == "openmeter-v3"

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what depends on a customer, None if it does not exist."""
        one = quote(customer_id, safe="")
        path = f"/openmeter/customers/{one}" if self._is_v3 else f"/api/v1/customers/{one}"
        document = self._object(path)
        if document is None or document.get("deletedAt") or document.get("deleted_at"):
            return None
        read = self._v3 if self._is_v3 else self._v1
        entitlements, subscriptions, others = read(path, customer_id)
        listed = {str(entry.get("id")): str(entry.get("status")) for entry in subscriptions}
        if len(subscriptions) >= _PAGE:
            # Only the first page is read. An active one may follow on the next page, so assume that it does.
            listed["and perhaps more than were listed"] = "unknown"
        return Inspection(
            str(document.get("name")),
            _details(document),
            tuple(sorted(entitlements)),
            listed,
            others,
            self._open_invoices(customer_id),
        )

    def _open_invoices(self, customer_id: str) -> tuple[str, ...]:
        """Return the invoices that forbid a deletion: a list without `statuses` leaves gathering ones out."""
        if self._is_v3:  # refuses that filter, and answers 404 for such an invoice
            return ()
        params: Params = {"statuses": _OPEN_INVOICE, "customers": customer_id, "page": 1, "pageSize": _PAGE}
        found = self._listed("/api/v1/billing/invoices", "items", params)
        return tuple(str(entry.get("id")) for entry in found)

    def _v1(self, path: str, _id: str) -> tuple[list[str], list[dict[str, object]], tuple[str, ...]]:
        access = self._object(f"{path}/access") or {}
        subscriptions = self._listed(f"{path}/subscriptions", "items", {"page": 1, "pageSize": _PAGE})
        apps = self._listed(f"{path}/apps", "items", {"page": 1, "pageSize": _PAGE})
        accounts = sorted({str(app.get("type")) for app in apps} - {"sandbox"})
        others = tuple(f"an account with {name}" for name in accounts)
        return list(_mapping(access.get("entitlements"))), subscriptions, others

    def _v3(self, path: str, customer_id: str) -> tuple[list[str], list[dict[str, object]], tuple[str, ...]]:
        access = self._listed(f"{path}/entitlement-access", "data", None)
        page: Params = {"page[size]": _PAGE, "page[number]": 1}
        subscriptions = self._listed(
            "/openmeter/subscriptions", "data", {**page, "filter[customer_id][eq]": customer_id}
        )
        others = [f"an account with {name}" for name in sorted(self._accounts(path))]
        if self._listed(f"{path}/credits/grants", "data", page):
            others.append("credits")
        return [str(entry.get("feature_key")) for entry in access], subscriptions, tuple(others)

    def _accounts(self, path: str) -> list[str]:
        try:
            billing = self._object(f"{path}/billing") or {}
        except RefusedError:
            # The answer if the payment app does not know the customer.
            return []
        return [name for name, account in _mapping(billing.get("app_data")).items() if account]

    def _object(self, path: str, params: Params | None = None) -> dict[str, object] | None:
        try:
            return expect_object(self._client.get(path, params), _API, path)
        except RefusedError as error:
            if error.status not in _GONE:
                raise
            return None

    def _listed(self, path: str, field: str, params: Params | None) -> list[dict[str, object]]:
        answer = self._object(path, params)
        if answer is None:  # an edition of the server without such a list
            return []
        entries = expect_list(answer.get(field), _API, f"{field} of {path}")
        return [expect_object(entry, _API, f"an entry of {path}") for entry in entries]


def _details(document: Mapping[str, object]) -> CustomerDetails:
    def text(*names: str) -> str | None:
        return next((str(document[name]) for name in names if document.get(name)), None)

    address = _mapping(document.get("billing_address") or document.get("billingAddress"))
    return CustomerDetails(
        email=text("primary_email", "primaryEmail"),
        currency=text("currency"),
        description=text("description"),
        billing_address={_snake(name): str(value) for name, value in address.items() if value},
        metadata={
            name: str(value)
            for name, value in _mapping(document.get("labels") or document.get("metadata")).items()
        },
    )


def _snake(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name)


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


class NoRemover:
    """Refuses every deletion."""

    def delete_customer(self, customer_id: str) -> bool:
        """Refuse."""
        raise BlockedError(f"deletions are not allowed here: customer {customer_id}")

    def delete_subject(self, key: str) -> bool:
        """Refuse."""
        raise BlockedError(f"deletions are not allowed here: subject {key}")


class ApiRemover:
    """Deletes through the metering API of either dialect. DELETE is idempotent, so it is retried."""

    def __init__(self, client: ApiClient, dialect: Literal["openmeter-v1", "openmeter-v3"]) -> None:
        self._client = client
        self._customers = "/api/v1/customers" if dialect == "openmeter-v1" else "/openmeter/customers"
        self._subjects = "/api/v1/subjects" if dialect == "openmeter-v1" else None

    def delete_customer(self, customer_id: str) -> bool:
        """Delete a customer by its id."""
        return self._delete(f"{self._customers}/{quote(customer_id, safe='')}")

    def delete_subject(self, key: str) -> bool:
        """Delete a subject entity, if the dialect has them."""
        return self._subjects is not None and self._delete(f"{self._subjects}/{quote(key, safe='')}")

    def _delete(self, path: str) -> bool:
        try:
            self._client.request("DELETE", path)
        except RefusedError as error:
            if error.status in _GONE:
                return False
            raise
        return True
