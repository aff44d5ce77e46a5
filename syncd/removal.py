"""Deleting customers and subject entities: apart from the other writes, so that few places can do it."""

from __future__ import annotations

from typing import Literal, Protocol
from urllib.parse import quote

from syncd.errors import BlockedError, RefusedError
from syncd.http import ApiClient

_GONE = frozenset({404, 410, 412})


class Remover(Protocol):
    """What can delete; both methods tell whether there was anything, and raise the ApiError that fits."""

    def delete_customer(self, customer_id: str) -> bool:
        """Delete a customer; the server refuses one with a subscription or an entitlement."""

    def delete_subject(self, key: str) -> bool:
        """Delete a subject entity."""


class NoRemover:
    """Deletes nothing: for where nothing may be deleted."""

    def delete_customer(self, customer_id: str) -> bool:
        """Refuse."""
        raise BlockedError(f"nothing may be deleted here, so neither may customer {customer_id}")

    def delete_subject(self, key: str) -> bool:
        """Refuse."""
        raise BlockedError(f"nothing may be deleted here, so neither may subject {key}")


class ApiRemover:
    """Deletes by the metering API of either dialect; a repeated DELETE does no harm, so it is repeated."""

    def __init__(self, client: ApiClient, dialect: Literal["openmeter-v1", "openmeter-v3"]) -> None:
        self._client = client
        self._customers = "/api/v1/customers" if dialect == "openmeter-v1" else "/openmeter/customers"
        self._subjects = "/api/v1/subjects" if dialect == "openmeter-v1" else None

    def delete_customer(self, customer_id: str) -> bool:
        """Delete a customer by its id."""
        return self._delete(f"{self._customers}/{quote(customer_id, safe='')}")

    def delete_subject(self, key: str) -> bool:
        """Delete a subject entity, where the dialect knows them."""
        return self._subjects is not None and self._delete(f"{self._subjects}/{quote(key, safe='')}")

    def _delete(self, path: str) -> bool:
        try:
            self._client.request("DELETE", path)
        except RefusedError as error:
            if error.status in _GONE:
                return False
            raise
        return True
