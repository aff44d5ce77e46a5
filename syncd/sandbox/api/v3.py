"""Routes of the v3 API under /api/v3/openmeter, over the same store as v1."""

import sqlite3
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from syncd.sandbox.api import v3_shapes as shapes
from syncd.sandbox.api.common import (
    Db,
    FaultsInForce,
    Options,
    Ulid,
    answer,
    is_ulid,
    no_content,
    seconds,
    v3_filters,
)
from syncd.sandbox.api.customers import refuse_too_many_subjects
from syncd.sandbox.api.v3_shapes import CreateCustomer, CreateMeter, QueryMeter, UpsertCustomer
from syncd.sandbox.problems import NAMESPACE, ProblemError, bad_parameter, konnect, not_found
from syncd.sandbox.store import billing, customers, meters, usage

EVERYTHING = 2**31
STATUSES = ("active", "inactive", "canceled", "scheduled")
BILLING_PROFILE = "01HZZZZZZZ0000000000000000"
"""The id of the profile by which every customer is billed."""

router = APIRouter(prefix="/api/v3/openmeter", tags=["v3"])

_WINDOWS = {"PT1M": "MINUTE", "PT1H": "HOUR", "P1D": "DAY", "P1M": "MONTH"}

Size = Annotated[int, Query(alias="page[size]", ge=0)]
"""Has no maximum, and 0 asks for everything."""

Number = Annotated[int, Query(alias="page[number]", ge=1)]


@router.post("/customers")
def create_customer(body: CreateCustomer, db: Db, options: Options) -> Response:
    """Create a customer; 201."""
    stored = body.stored(body.key)
    refuse_too_many_subjects(stored, options)
    with db.writing() as connection:
        return answer(
            shapes.customer(customers.create(connection, stored, provision=options.provision_subjects)), 201
        )


@router.get("/customers")
def list_customers(
    request: Request,
    db: Db,
    faults: FaultsInForce,
    size: Size = 20,
    number: Number = 1,
    sort: str = "name",
) -> Response:
    """List customers that are not deleted, one page at a time."""
    filters = v3_filters(
        request, {"key", "name", "primary_email", "usage_attribution_subject_key", "plan_key"}
    )
    orders = {"id": "id", "name": "name", "created_at": "createdAt"}
    field, _, direction = sort.partition(" ")
    if field not in orders or direction not in ("", "asc", "desc"):
        reason = f'unsupported sort field "{field}", supported fields: id, created_at, name'
        raise bad_parameter("sort", reason, source="query")
    wanted = customers.CustomerFilter(
        page=number,
        page_size=size or EVERYTHING,
        order_by=orders[field],
        order=direction.upper() or "ASC",
        key=filters.get(("key", "contains")),
        key_is=filters.get(("key", "eq")),
        name=filters.get(("name", "contains")),
        primary_email=filters.get(("primary_email", "contains")),
        subject=filters.get(("usage_attribution_subject_key", "contains")),
        subject_is=filters.get(("usage_attribution_subject_key", "eq")),
        plan_key=filters.get(("plan_key", "eq")),
        lag=faults.lag.seconds,
    )
    with db.reading() as connection:
        total, items = customers.list_customers(connection, wanted, expand=False)
    return _page([shapes.customer(item) for item in items], size, number, total)


@router.get("/customers/{customer_id}")
def get_customer(customer_id: Ulid, db: Db) -> Response:
    """Return a customer by id, even if deleted; keys are not accepted."""
    with db.reading() as connection:
        return answer(shapes.customer(_by_id(connection, customer_id)))


@router.put("/customers/{customer_id}")
def replace_customer(customer_id: Ulid, body: UpsertCustomer, db: Db, options: Options) -> Response:
    """Replace a customer except its key; properties missing from the body are cleared."""
    with db.writing() as connection:
        customer = _live(connection, customer_id)
        stored = body.stored(customer.get("key", ""))
        refuse_too_many_subjects(stored, options)
        return answer(
            shapes.customer(
                customers.replace(connection, customer_id, stored, provision=options.provision_subjects)
            )
        )


@router.delete("/customers/{customer_id}")
def delete_customer(customer_id: Ulid, db: Db) -> Response:
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


@router.get("/customers/{customer_id}/billing")
def get_billing(customer_id: Ulid, db: Db) -> Response:
    """Return the billing data of a customer: none, as with OpenMeter's own sandbox app."""
    with db.reading() as connection:
        _by_id(connection, customer_id)
    return answer({"app_data": {}, "billing_profile": {"id": BILLING_PROFILE}})


@router.get("/subscriptions")
def list_subscriptions(request: Request, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List subscriptions, one page at a time: active ones, and inactive ones that have ended."""
    filters = v3_filters(request, {"customer_id", "status"})
    statuses = (filters.get(("status", "eq")) or filters.get(("status", "oeq")) or ",".join(STATUSES)).split(
        ","
    )
    if unknown := [status for status in statuses if status not in STATUSES]:
        reason = f"validation error: invalid subscription status: {unknown[0]}"
        raise bad_parameter("filter[status]", reason, source="query")
    if not is_ulid(filters.get(("customer_id", "eq"), BILLING_PROFILE)):
        raise bad_parameter(
            "customer_id", 'doesn\'t match any schema from "anyOf"', rule="anyOf", source="query"
        )
    with db.reading() as connection:
        found = billing.all_subscriptions(connection, filters.get(("customer_id", "eq")))
    shown = [shapes.subscription(item) for item in found if item["status"] in statuses]
    return _page(_cut(shown, size, number), size, number, len(shown))


@router.get("/billing/invoices")
def list_invoices(request: Request, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List invoices, one page at a time. Those still gathering are invisible in v3."""
    filters = v3_filters(request, {"customer_id", "status"})
    status = filters.get(("status", "eq"))
    if status not in (None, "draft", "issuing", "issued", "paid"):
        reason = f"validation error: invalid invoice short status: {status}"
        raise bad_parameter("filter[status]", reason, source="query")
    customer = filters.get(("customer_id", "eq"))
    with db.reading() as connection:
        found = billing.invoices(connection, [customer] if customer else [], [status] if status else [])
    return _page(_cut(found, size, number), size, number, len(found))


@router.get("/meters")
def list_meters(request: Request, db: Db, size: Size = 20, number: Number = 1) -> Response:
    """List meters, one page at a time."""
    key = v3_filters(request, {"key", "name"}).get(("key", "eq"))
    with db.reading() as connection:
        found = [item for item in meters.list_meters(connection) if key in (None, item["slug"])]
    shown = [shapes.meter(item) for item in found]
    return _page(_cut(shown, size, number), size, number, len(shown))


@router.post("/meters")
def create_meter(body: CreateMeter, db: Db) -> Response:
    """Create a meter; 201."""
    with db.writing() as connection:
        made = shapes.meter(meters.create(connection, body.stored()))
    # Only this answer tells no dimensions from none given.
    return answer(made | {"dimensions": body.dimensions}, 201)


@router.get("/meters/{meter_id}")
def get_meter(meter_id: Ulid, db: Db) -> Response:
    """Return a meter by id."""
    with db.reading() as connection:
        return answer(shapes.meter(meters.get(connection, meter_id)))


@router.post("/meters/{meter_id}/query")
def query_meter(meter_id: Ulid, body: QueryMeter, db: Db) -> Response:
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
        meter = meters.get(connection, meter_id)
        rows = usage.query(connection, meter, wanted)
    period = {"from": body.time_from, "to": body.time_to}
    shown = {name: value for name, value in period.items() if value is not None}
    return answer(shown | {"data": [shapes.usage_row(row) for row in rows]})


def _live(connection: sqlite3.Connection, customer_id: str) -> dict[str, Any]:
    """Return a customer that is not deleted. Raises the 404, or the 410 for a deleted one."""
    customer = _by_id(connection, customer_id)
    if "deletedAt" in customer:
        raise konnect(410, "The requested resource is no longer available")
    return customer


def _by_id(connection: sqlite3.Connection, customer_id: str) -> dict[str, Any]:
    """Return a customer by its id. Raises the 404."""
    try:
        customer = customers.get(connection, customer_id)
    except ProblemError:
        customer = {}
    if customer.get("id") != customer_id:  # a key may look like an id
        raise not_found(f"customer with id {customer_id} not found in {NAMESPACE} namespace")
    return customer


def _cut(items: list[dict[str, Any]], size: int, number: int) -> list[dict[str, Any]]:
    return items[(number - 1) * size : number * size] if size else items


def _page(data: list[dict[str, Any]], size: int, number: int, total: int) -> Response:
    return answer({"data": data, "meta": {"page": {"number": number, "size": size, "total": total}}})
