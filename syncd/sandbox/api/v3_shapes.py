"""Request bodies and answers of the v3 API, converted from and to those of the store, which are v1's."""

import re
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel, to_snake

from syncd.sandbox.problems import bad_schema, broken_rule, invalid
from syncd.sandbox.store.customer_body import CustomerBody
from syncd.sandbox.store.meters import MeterBody
from syncd.sandbox.values import epoch_seconds, parse_time, rfc3339

# api/v3/labels/validate.go.
_LABEL = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9._-]?[a-zA-Z0-9])?){1,63}")
_RESERVED = re.compile(r"_|kong|konnect|insomnia|mesh|kic|kuma|openmeter")

_LabelText = Annotated[
    str, Field(min_length=1, max_length=63, pattern="^[a-z0-9A-Z]{1}([a-z0-9A-Z-._]*[a-z0-9A-Z]+)?$")
]
Labels = Annotated[dict[str, _LabelText], Field(max_length=50)]


class V3Body(BaseModel):
    """A body of the v3 API: in snake_case, strictly typed, unknown properties refused, nothing nullable."""

    model_config = ConfigDict(strict=True, extra="forbid")

    needed: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_nulls(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if value is None:
                raise bad_schema(f"/{name}", "Value is not nullable", "nullable")
        return data


class UsageAttribution(V3Body):
    """BillingCustomerUsageAttribution."""

    subject_keys: list[Annotated[str, Field(min_length=1)]]


class Address(V3Body):
    """Address; all parts are optional."""

    country: str | None = Field(default=None, pattern="^[A-Z]{2}$")
    postal_code: str | None = None
    state: str | None = None
    city: str | None = None
    line1: str | None = None
    line2: str | None = None
    phone_number: str | None = None


class UpsertCustomer(V3Body):
    """UpsertCustomerRequest: without the key, which never changes."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = Field(default=None, max_length=1024)
    labels: Labels | None = None
    usage_attribution: UsageAttribution | None = None
    primary_email: str | None = None
    currency: str | None = Field(default=None, pattern="^[A-Z]{3}$")
    billing_address: Address | None = None

    def stored(self, key: str) -> CustomerBody:
        """Return the body for the store. Raises the 400 for invalid labels."""
        given = self.model_dump(exclude_none=True) | {"key": key}
        labels = given.pop("labels", None)
        if labels:
            _check_labels(labels)
            given["metadata"] = labels
        return CustomerBody.model_validate(_to_camel(given))


class CreateCustomer(UpsertCustomer):
    """CreateCustomerRequest."""

    key: str = Field(min_length=1, max_length=256)


class CreateMeter(V3Body):
    """CreateMeterRequest, without the aggregation `latest`, which the sandbox does not support."""

    name: str = Field(min_length=1, max_length=256)
    key: str = Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$", max_length=64)
    aggregation: Literal["sum", "count", "unique_count", "avg", "min", "max"]
    event_type: str = Field(min_length=1)
    description: str | None = Field(default=None, max_length=1024)
    labels: Labels | None = None
    events_from: str | None = None
    value_property: str | None = None
    dimensions: dict[str, str] | None = None

    def stored(self) -> MeterBody:
        """Return the body for the store. Raises the 400 for invalid labels or contradictory properties."""
        if self.labels:
            _check_labels(self.labels)
        fields = {
            "slug": self.key,
            "name": self.name,
            "description": self.description,
            "aggregation": self.aggregation.upper(),
            "eventType": self.event_type,
            "eventFrom": self.events_from,
            "valueProperty": self.value_property,
            "groupBy": self.dimensions,
            "metadata": self.labels,
        }
        try:
            return MeterBody.model_validate(
                {name: value for name, value in fields.items() if value is not None}
            )
        except ValueError as error:
            raise invalid(str(error).splitlines()[2].strip()) from None


class DimensionFilter(V3Body):
    """QueryFilterStringMapItem, of which the sandbox supports `eq` and `in`."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    eq: str | None = None
    within: Annotated[list[str] | None, Field(alias="in", min_length=1, max_length=100)] = None

    def values(self) -> list[str]:
        """Return the accepted values."""
        return ([self.eq] if self.eq is not None else []) + (self.within or [])


class QueryFilters(V3Body):
    """MeterQueryFilters."""

    dimensions: dict[str, DimensionFilter] = Field(default_factory=dict, max_length=10)


class QueryMeter(V3Body):
    """MeterQueryRequest."""

    time_from: str | None = Field(default=None, alias="from")
    time_to: str | None = Field(default=None, alias="to")
    granularity: Literal["PT1M", "PT1H", "P1D", "P1M"] | None = None
    time_zone: str = "UTC"
    group_by_dimensions: list[str] = Field(default_factory=list, max_length=100)
    filters: QueryFilters = Field(default_factory=QueryFilters)

    @field_validator("time_from", "time_to")
    @classmethod
    def _is_time(cls, moment: str | None) -> str | None:
        if moment is not None:
            parse_time(moment)
        return moment


def customer(document: dict[str, Any]) -> dict[str, Any]:
    """Return a customer in v3's shape; metadata that are not valid labels are left out."""
    shown = _to_snake(document)
    for name in ("current_subscription_id", "subscriptions"):
        shown.pop(name, None)
    shown["labels"] = _visible(shown.pop("metadata", None) or {})
    return shown


def meter(document: dict[str, Any]) -> dict[str, Any]:
    """Return a meter in v3's shape."""
    names = {"slug": "key", "groupBy": "dimensions", "eventFrom": "events_from", "metadata": "labels"}
    shown = {names.get(name, to_snake(name)): value for name, value in document.items()}
    shown["aggregation"] = document["aggregation"].lower()
    shown.pop("annotations")
    shown.setdefault("dimensions", {})
    shown["labels"] = _visible(shown.get("labels") or {})
    return shown


def subscription(document: dict[str, Any]) -> dict[str, Any]:
    """Return a subscription in v3's shape; the sandbox has no phases."""
    left_out = {"currency", "alignment"}
    shown = {to_snake(name): value for name, value in document.items() if name not in left_out}
    shown |= {"invoice_currency": document["currency"], "labels": {}, "phases": []}
    if document["status"] in ("active", "canceled"):
        since = parse_time(document["activeFrom"])
        shown["current_period"] = {
            "from": document["activeFrom"],
            "to": rfc3339(epoch_seconds(since + timedelta(days=31))),
        }
    if "plan" in document:
        shown["plan_id"] = document["plan"]["id"]
    return shown


def usage_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of usage in v3's shape: the value as text, and all dimensions in one map."""
    dimensions = {"subject": row["subject"], "customer_id": row.get("customerId"), **row["groupBy"]}
    return {
        "value": format(row["value"], "f") if isinstance(row["value"], float) else str(row["value"]),
        "from": row["windowStart"],
        "to": row["windowEnd"],
        "dimensions": {name: value for name, value in dimensions.items() if value is not None},
    }


def _visible(metadata: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if _label_error(name, value) is None}


def _check_labels(labels: dict[str, str]) -> None:
    for name, value in labels.items():
        if error := _label_error(name, value):
            code, message = error
            raise broken_rule(code, "$.labels", message)


def _label_error(name: str, value: str) -> tuple[str, str] | None:
    if not _LABEL.fullmatch(name):
        return "invalid_label_key_format", "label key must be in valid format"
    if not _LABEL.fullmatch(value):
        return "invalid_label_value_format", "label value must be in valid format"
    if _RESERVED.match(name):
        return "invalid_label_key_prefix", "label key must not have reserved prefix"
    return None


def _to_camel(document: dict[str, Any]) -> dict[str, Any]:
    return _renamed(document, to_camel)


def _to_snake(document: dict[str, Any]) -> dict[str, Any]:
    return _renamed(document, _snake)


def _snake(name: str) -> str:
    # pydantic would part the number: line_1.
    return name if name in ("line1", "line2") else to_snake(name)


def _renamed(document: dict[str, Any], rename: Any) -> dict[str, Any]:
    nested = {"usageAttribution", "usage_attribution", "billingAddress", "billing_address"}
    return {
        rename(name): {rename(part): inner for part, inner in value.items()} if name in nested else value
        for name, value in document.items()
    }
