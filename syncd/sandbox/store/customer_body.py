"""The body of a customer, and which properties survive when a PUT replaces it."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from syncd.sandbox.bodies import Body, Metadata
from syncd.sandbox.problems import invalid

# ISO 4217, the codes in circulation: OpenMeter refuses others (github.com/invopop/gobl/currency).
_CURRENCIES = frozenset(
    [
        "AED",
        "AFN",
        "ALL",
        "AMD",
        "ANG",
        "AOA",
        "ARS",
        "AUD",
        "AWG",
        "AZN",
        "BAM",
        "BBD",
        "BDT",
        "BGN",
        "BHD",
        "BIF",
        "BMD",
        "BND",
        "BOB",
        "BRL",
        "BSD",
        "BTN",
        "BWP",
        "BYN",
        "BZD",
        "CAD",
        "CDF",
        "CHF",
        "CLP",
        "CNY",
        "COP",
        "CRC",
        "CUP",
        "CVE",
        "CZK",
        "DJF",
        "DKK",
        "DOP",
        "DZD",
        "EGP",
        "ERN",
        "ETB",
        "EUR",
        "FJD",
        "FKP",
        "GBP",
        "GEL",
        "GHS",
        "GIP",
        "GMD",
        "GNF",
        "GTQ",
        "GYD",
        "HKD",
        "HNL",
        "HTG",
        "HUF",
        "IDR",
        "ILS",
        "INR",
        "IQD",
        "IRR",
        "ISK",
        "JMD",
        "JOD",
        "JPY",
        "KES",
        "KGS",
        "KHR",
        "KMF",
        "KPW",
        "KRW",
        "KWD",
        "KYD",
        "KZT",
        "LAK",
        "LBP",
        "LKR",
        "LRD",
        "LSL",
        "LYD",
        "MAD",
        "MDL",
        "MGA",
        "MKD",
        "MMK",
        "MNT",
        "MOP",
        "MRU",
        "MUR",
        "MVR",
        "MWK",
        "MXN",
        "MYR",
        "MZN",
        "NAD",
        "NGN",
        "NIO",
        "NOK",
        "NPR",
        "NZD",
        "OMR",
        "PAB",
        "PEN",
        "PGK",
        "PHP",
        "PKR",
        "PLN",
        "PYG",
        "QAR",
        "RON",
        "RSD",
        "RUB",
        "RWF",
        "SAR",
        "SBD",
        "SCR",
        "SDG",
        "SEK",
        "SGD",
        "SHP",
        "SLE",
        "SOS",
        "SRD",
        "SSP",
        "STN",
        "SVC",
        "SYP",
        "SZL",
        "THB",
        "TJS",
        "TMT",
        "TND",
        "TOP",
        "TRY",
        "TTD",
        "TWD",
        "TZS",
        "UAH",
        "UGX",
        "USD",
        "UYU",
        "UZS",
        "VED",
        "VES",
        "VND",
        "VUV",
        "WST",
        "XAF",
        "XCD",
        "XOF",
        "XPF",
        "YER",
        "ZAR",
        "ZMW",
        "ZWL",
    ]
)


def _known_currency(code: str) -> str:
    if code not in _CURRENCIES:
        raise invalid(f"error creating customer: validation error: invalid fiat currency code: {code}")
    return code


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
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$"), AfterValidator(_known_currency)] | None = None
    billing_address: Address | None = None

    nullable = frozenset({"metadata"})

    @model_validator(mode="after")
    def _is_reachable(self) -> Self:
        if self.key is None and not (self.usage_attribution and self.usage_attribution.subject_keys):
            raise invalid(
                "error creating customer: validation error: "
                "either key or usageAttribution.subjectKeys must be provided"
            )
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
