"""The body of a customer, and which properties survive when a PUT replaces it."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from syncd.sandbox.bodies import Body, Metadata

Key = Annotated[str, Field(min_length=1, max_length=256)]


class UsageAttribution(Body):
    """CustomerUsageAttribution of the API."""

    subject_keys: list[Annotated[str, Field(min_length=1)]]


class Address(Body):
    """Address of the API; all parts are optional."""

    country: str | None = Field(default=None, pattern="^[A-Z]{2}$")
    postal_code: str | None = None
    state: str | None = None
    city: str | None = None
    line1: str | None = None
    line2: str | None = None
    phone_number: str | None = None


class CustomerBody(Body):
    """CustomerCreate and CustomerReplaceUpdate of the API, which are the same."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = Field(default=None, max_length=1024)
    metadata: Metadata | None = None
    key: Key | None = None
    usage_attribution: UsageAttribution | None = None
    primary_email: str | None = None
    currency: str | None = Field(default=None, pattern="^[A-Z]{3}$")
    billing_address: Address | None = None

    nullable = frozenset({"metadata"})

    @model_validator(mode="after")
    def _is_reachable(self) -> Self:
        if self.key is None and not (self.usage_attribution and self.usage_attribution.subject_keys):
            raise ValueError("either key or usageAttribution.subjectKeys must be provided")
        return self


def replaced(previous: dict[str, Any], body: CustomerBody) -> dict[str, Any]:
    """Return the document of a customer after `body` was PUT over `previous`, which is empty for a new one.

    The e-mail address, the currency, and missing parts of a given billing address are preserved; everything
    else missing from the body is cleared (openmeter/customer/adapter/customer.go, UpdateCustomer). Subject
    keys are stored sorted, because the API sorts them in its answers (entitymapping.go); empty lists and maps
    are left out.
    """
    preserved = {name: previous[name] for name in ("primaryEmail", "currency") if name in previous}
    document = preserved | body.document()
    if "billingAddress" in document:
        document["billingAddress"] = previous.get("billingAddress", {}) | document["billingAddress"]
    if "usageAttribution" in document:
        document["usageAttribution"] = {"subjectKeys": sorted(set(subject_keys(document)))}
    shown_by = {
        "billingAddress": document.get("billingAddress"),
        "metadata": document.get("metadata"),
        "usageAttribution": subject_keys(document),
    }
    return {name: value for name, value in document.items() if shown_by.get(name, True)}


def subject_keys(document: dict[str, Any]) -> list[str]:
    """Return the subject keys of a customer in the API's shape."""
    keys: list[str] = document.get("usageAttribution", {}).get("subjectKeys", [])
    return keys
