"""Routes under /api/v1/customers."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from syncd.sandbox.api.common import Db, FaultsInForce, IdOrKey, Options, answer, no_content
from syncd.sandbox.problems import invalid
from syncd.sandbox.settings import Settings
from syncd.sandbox.store import billing
from syncd.sandbox.store import customers as store
from syncd.sandbox.store.customer_body import CustomerBody

router = APIRouter(tags=["Customers"])

PageNumber = Annotated[int, Query(ge=1)]
PageSize = Annotated[int, Query(alias="pageSize", ge=1, le=1000)]
# Its only value has no effect: OpenMeter always expands subscriptions:
# openmeter/customer/httpdriver/customer.go.
Expand = Annotated[list[Literal["subscriptions"]] | None, Query()]


@router.post("/api/v1/customers")
def create_customer(body: CustomerBody, db: Db, options: Options) -> Response:
    """Create a customer; 201."""
    refuse_too_many_subjects(body, options)
    with db.writing() as connection:
        return answer(store.create(connection, body, provision=options.provision_subjects), 201)


@router.get("/api/v1/customers")
def list_customers(
    db: Db,
    faults: FaultsInForce,
    page: PageNumber = 1,
    page_size: PageSize = 100,
    order_by: Annotated[Literal["id", "name", "createdAt"], Query(alias="orderBy")] = "name",
    order: Literal["ASC", "DESC"] = "ASC",
    include_deleted: Annotated[bool, Query(alias="includeDeleted")] = False,
    key: str | None = None,
    name: str | None = None,
    primary_email: Annotated[str | None, Query(alias="primaryEmail")] = None,
    subject: str | None = None,
    plan_key: Annotated[str | None, Query(alias="planKey")] = None,
    _expand: Annotated[Expand, Query(alias="expand")] = None,
) -> Response:
    """List customers, one page at a time: {totalCount, page, pageSize, items}."""
    wanted = store.CustomerFilter(
        page=page,
        page_size=page_size,
        order_by=order_by,
        order=order,
        include_deleted=include_deleted,
        key=key,
        name=name,
        primary_email=primary_email,
        subject=subject,
        plan_key=plan_key,
        lag=faults.lag.seconds,
    )
    with db.reading() as connection:
        total, items = store.list_customers(connection, wanted, expand=True)
    return answer({"totalCount": total, "page": page, "pageSize": page_size, "items": items})


@router.get("/api/v1/customers/{id_or_key}/subscriptions")
def list_subscriptions(
    id_or_key: IdOrKey, db: Db, page: PageNumber = 1, page_size: PageSize = 100
) -> Response:
    """List the subscriptions of a customer, including ended ones, one page at a time."""
    with db.reading() as connection:
        found = billing.all_subscriptions(connection, store.get_live(connection, id_or_key)["id"])
    shown = found[(page - 1) * page_size : page * page_size]
    return answer({"totalCount": len(found), "page": page, "pageSize": page_size, "items": shown})


@router.get("/api/v1/customers/{id_or_key}/apps")
def list_apps(id_or_key: IdOrKey, db: Db, page: PageNumber = 1, page_size: PageSize = 100) -> Response:
    """List the customer's accounts with apps such as Stripe: none, because the sandbox has no apps."""
    with db.reading() as connection:
        store.get_live(connection, id_or_key)
    return answer({"totalCount": 0, "page": page, "pageSize": page_size, "items": []})


@router.get("/api/v1/billing/invoices")
def list_invoices(
    db: Db,
    page: PageNumber = 1,
    page_size: PageSize = 100,
    customer_ids: Annotated[list[str], Query(alias="customers")] = [],  # noqa: B006 - FastAPI copies it
    statuses: Annotated[list[str], Query()] = [],  # noqa: B006
) -> Response:
    """List invoices; those still gathering only if `statuses` asks for them."""
    with db.reading() as connection:
        found = billing.invoices(connection, customer_ids, statuses)
    shown = found[(page - 1) * page_size : page * page_size]
    return answer({"totalCount": len(found), "page": page, "pageSize": page_size, "items": shown})


@router.get("/api/v1/customers/{id_or_key}")
def get_customer(
    id_or_key: IdOrKey, db: Db, _expand: Annotated[Expand, Query(alias="expand")] = None
) -> Response:
    """Return a customer by id, even if deleted, or by key if it is not deleted."""
    with db.reading() as connection:
        return answer(store.get(connection, id_or_key, expand=True))


@router.put("/api/v1/customers/{id_or_key}")
def replace_customer(id_or_key: IdOrKey, body: CustomerBody, db: Db, options: Options) -> Response:
    """Replace a customer by id or key; properties missing from the body are cleared."""
    refuse_too_many_subjects(body, options)
    with db.writing() as connection:
        return answer(store.replace(connection, id_or_key, body, provision=options.provision_subjects))


@router.delete("/api/v1/customers/{id_or_key}")
def delete_customer(id_or_key: IdOrKey, db: Db) -> Response:
    """Delete a customer by id or key; 204."""
    with db.writing() as connection:
        store.delete(connection, id_or_key)
    return no_content()


def refuse_too_many_subjects(body: CustomerBody, options: Settings) -> None:
    """Raise the 400 if a customer has more subject keys than the sandbox allows."""
    limit = options.max_subjects_per_customer
    subjects = body.usage_attribution.subject_keys if body.usage_attribution else []
    if limit is not None and len(subjects) > limit:
        raise invalid(f"a customer may have at most {limit} subject keys, not {len(subjects)}")
