"""Routes of the v3 API under /api/v3/openmeter, over the same store as v1."""

import re
import sqlite3
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from syncd.sandbox.api import v3_shapes as shapes
from syncd.sandbox.api.common import Db, Options, answer, no_content, seconds
from syncd.sandbox.api.customers import refuse_too_many_subjects
from syncd.sandbox.api.v3_shapes import CreateCustomer, CreateMeter, QueryMeter, UpsertCustomer
from syncd.sandbox.problems import NAMESPACE, ProblemError, invalid, not_found
from syncd.sandbox.store import billing, customers, meters, usage

router = APIRouter(prefix="/api/v3/openmeter", tags=["v3"])

_FILTER = re.compile(r"filter\[(\w+)\](?:\[(\w+)\])?")
_WINDOWS = {"PT1M": "MINUTE", "PT1H": "HOUR", "P1D": "DAY", "P1M": "MONTH"}

Size = Annotated[int, Query(alias="page[size]", ge=1)]
Number = Annotated[int, Query(alias="page[number]", ge=1)]


@router.post("/customers")
def create_customer(body: CreateCustomer, db: Db, options: Options) -> Response:
    """Create a customer; 201."""
    stored = body.stored(body.key)
    refuse_too_many_subjects(stored, options)
    with db.writing() as connection:
        return answer(shapes.customer(customers.create(connection, stored)), 201)


@router.get("/customers")
def list_customers(
    request: Request, db: Db, size: Size = 20, number: Number = 1, sort: str = "name"
) -> Response:
    """List customers that are not deleted, one page at a time."""
    filters = _filters(request, {"key", "name", "primary_email", "usage_attribution_subject_key", "plan_key"})
    orders = {"id": "id", "name": "name", "created_at": "createdAt"}
    field, _, direction = sort.partition(" ")
    if field not in orders or direction not in ("", "asc", "desc"):
        raise invalid(f"unsupported sort: {sort}")
    wanted = customers.CustomerFilter(
        page=number,
        page_size=size,
        order_by=orders[field],
        order=direction.upper() or "ASC",
        key=filters.get(("key", "contains")),
        key_is=filters.get(("key", "eq")),
        name=filters.get(("name", "contains")),
        primary_email=filters.get(("primary_email", "contains")),
        subject=filters.get(("usage_attribution_subject_key", "contains")),
        subject_is=filters.get(("usage_attribution_subject_key", "eq")),
        plan_key=filters.get(("plan_key", "eq")),
    )
    with db.reading() as connection:
        total, items = customers.list_customers(connection, wanted, expand=False)
    return _page([shapes.customer(item) for item in items], size, number, total)


@router.get("/customers/{customer_id}")
def get_customer(customer_id: str, db: Db) -> Response:
    """Return a customer by id, even if deleted; keys are not accepted."""
    with db.reading() as connection:
        return answer(shapes.customer(_by_id(customers.get(connection, customer_id), customer_id)))


@router.put("/customers/{customer_id}")
def replace_customer(customer_id: str, body: UpsertCustomer, db: Db, options: Options) -> Response:
    """Replace a customer except its key; properties missing from the body are cleared."""
    with db.writing() as connection:
        customer = _live(connection, customer_id)
        stored = body.stored(customer.get("key", ""))
        refuse_too_many_subjects(stored, options)
        return answer(shapes.customer(customers.replace(connection, customer_id, stored)))


@router.delete("/customers/{customer_id}")
def delete_customer(customer_id: str, db: Db) -> Response:
    """Delete a customer by id; 204 even if there is none (openmeter/customer/service/customer.go)."""
    with db.writing() as connection:
        try:
            customer = _live(connection, customer_id)
        except ProblemError as problem:
            if problem.status not in (404, 410, 412):
                raise
        else:
            customers.delete(connection, customer["id"])
    return no_content()


@router.get("/customers/{customer_id}/entitlement-access")
def list_entitlement_access(customer_id: str, db: Db) -> Response:
    """List the features that a customer has access to: {data}."""
    with db.reading() as connection:
        _live(connection, customer_id)
        found = billing.entitlements(connection, customer_id)
    shown = [{"type": "boolean", "feature_key": e["feature_key"], "has_access": True} for e in found]
    return answer({"data": shown})


@router.get("/customers/{customer_id}/billing")
def get_billing(customer_id: str, db: Db) -> Response:
    """Return the billing data of a customer: none, as with OpenMeter's own sandbox app."""
    with db.reading() as connection:
        _live(connection, customer_id)
    return answer({"app_data": {}})


@router.get("/customers/{customer_id}/credits/grants")
def list_credit_grants(customer_id: str, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List the credits of a customer: none, because the sandbox prices nothing."""
    with db.reading() as connection:
        _live(connection, customer_id)
    return _page([], size, number, 0)


@router.get("/subscriptions")
def list_subscriptions(request: Request, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List subscriptions, one page at a time: active ones, and inactive ones that have ended."""
    filters = _filters(request, {"customer_id", "status"})
    statuses = filters.get(("status", "eq")) or filters.get(("status", "oeq")) or "active,inactive"
    with db.reading() as connection:
        found = billing.all_subscriptions(connection, filters.get(("customer_id", "eq")))
    shown = [shapes.subscription(item) for item in found if item["status"] in statuses.split(",")]
    return _page(shown[(number - 1) * size : number * size], size, number, len(shown))


@router.get("/meters")
def list_meters(request: Request, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List meters, one page at a time."""
    key = _filters(request, {"key", "name"}).get(("key", "eq"))
    with db.reading() as connection:
        found = [item for item in meters.list_meters(connection) if key in (None, item["slug"])]
    shown = [shapes.meter(item) for item in found]
    return _page(shown[(number - 1) * size : number * size], size, number, len(shown))


@router.post("/meters")
def create_meter(body: CreateMeter, db: Db) -> Response:
    """Create a meter; 201."""
    with db.writing() as connection:
        return answer(shapes.meter(meters.create(connection, body.stored())), 201)


@router.get("/meters/{meter_id}")
def get_meter(meter_id: str, db: Db) -> Response:
    """Return a meter by id."""
    with db.reading() as connection:
        return answer(shapes.meter(_by_id(meters.get(connection, meter_id), meter_id)))


@router.post("/meters/{meter_id}/query")
def query_meter(meter_id: str, body: QueryMeter, db: Db) -> Response:
    """Query usage: {from, to, data}."""
    filters = {name: given.values() for name, given in body.filters.dimensions.items()}
    wanted = usage.Query(
        time_from=seconds(body.time_from),
        time_to=seconds(body.time_to),
        window_size=_WINDOWS.get(body.granularity or ""),
        time_zone=body.time_zone,
        subjects=filters.pop("subject", []),
        customer_ids=filters.pop("customer_id", []),
        group_by=body.group_by_dimensions,
        group_filters={name: values[0] for name, values in filters.items() if values},
    )
    with db.reading() as connection:
        meter = _by_id(meters.get(connection, meter_id), meter_id)
        rows = usage.query(connection, meter, wanted)
    period = {"from": body.time_from, "to": body.time_to}
    shown = {name: value for name, value in period.items() if value is not None}
    return answer(shown | {"data": [shapes.usage_row(row) for row in rows]})


def _live(connection: sqlite3.Connection, customer_id: str) -> dict[str, Any]:
    """Return a customer that is not deleted. Raises the 404, or the 410 for a deleted one."""
    customer = _by_id(customers.get(connection, customer_id), customer_id)
    if "deletedAt" in customer:
        raise ProblemError(410, "customer is deleted")
    return customer


def _by_id(document: dict[str, Any], wanted: str) -> dict[str, Any]:
    """Raise the 404 for a document found by its key: v3 accepts ids only."""
    if document["id"] != wanted:
        raise not_found(f"{wanted} not found in {NAMESPACE} namespace")
    return document


def _filters(request: Request, known: set[str]) -> dict[tuple[str, str], str]:
    """Return the filters of a query string by field and operator; the default operator is `eq`."""
    found: dict[tuple[str, str], str] = {}
    for name, value in request.query_params.multi_items():
        match = _FILTER.fullmatch(name)
        if match is None:
            continue
        field, operator = match[1], match[2] or "eq"
        if field not in known:
            raise invalid(f"unknown filter field: {field}")
        if operator not in ("eq", "oeq", "contains"):
            raise invalid(f"the sandbox does not support the filter operator {operator}")
        found[field, operator] = value
    return found


def _page(data: list[dict[str, Any]], size: int, number: int, total: int) -> Response:
    return answer({"data": data, "meta": {"page": {"number": number, "size": size, "total": total}}})
