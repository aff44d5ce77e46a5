"""Routes of features and entitlements (v1, v2), and of access and credits (v3)."""

import base64
import binascii
import sqlite3
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from syncd.sandbox.api import v3_shapes as shapes
from syncd.sandbox.api.common import Db, IdOrKey, Ulid, answer, no_content, v3_filters
from syncd.sandbox.api.v3_shapes import V3Body
from syncd.sandbox.problems import NAMESPACE, ProblemError, bad_parameter, invalid, konnect, not_found
from syncd.sandbox.store import customers
from syncd.sandbox.store import entitlements as store
from syncd.sandbox.store.entitlements import EntitlementBody, FeatureBody
from syncd.sandbox.values import now_rfc3339

router = APIRouter(tags=["Entitlements"])

V1_CUSTOMER = "/api/v1/customers/{id_or_key}"
V2_ENTITLEMENTS = "/api/v2/customers/{id_or_key}/entitlements"
V3 = "/api/v3/openmeter"
MAX_KEYS = 100


@router.post("/api/v1/features")
def create_feature(body: FeatureBody, db: Db) -> Response:
    """Create a feature; 201."""
    with db.writing() as connection:
        return answer(store.create_feature(connection, body), 201)


@router.get("/api/v1/features")
def list_features(db: Db) -> Response:
    """List all features: an array, as OpenMeter answers without a page."""
    with db.reading() as connection:
        return answer(store.list_features(connection))


@router.get("/api/v1/features/{id_or_key}")
def get_feature(id_or_key: str, db: Db) -> Response:
    """Return a feature."""
    with db.reading() as connection:
        return answer(store.get_feature(connection, id_or_key))


@router.get(V1_CUSTOMER + "/access")
def get_access(id_or_key: IdOrKey, db: Db) -> Response:
    """Return what a customer has access to; `hasAccess` is left out where it is false."""
    with db.reading() as connection:
        found = store.values(connection, customers.get_live(connection, id_or_key)["id"])
    return answer({"entitlements": {key: _without_false_access(value) for key, value in found.items()}})


@router.get(V1_CUSTOMER + "/entitlements/{feature_key}/value")
def get_v1_value(id_or_key: IdOrKey, feature_key: str, db: Db) -> Response:
    """Return one feature's value; without an entitlement, even without such a feature, no access."""
    with db.reading() as connection:
        found = store.values(connection, customers.get_live(connection, id_or_key)["id"])
    value = found.get(feature_key, {"hasAccess": False})
    return answer({name: part for name, part in value.items() if name not in ("type", "grantBalances")})


@router.post(V2_ENTITLEMENTS)
def entitle(id_or_key: IdOrKey, body: EntitlementBody, db: Db) -> Response:
    """Give a customer an entitlement; 201."""
    with db.writing() as connection:
        return answer(store.entitle(connection, customers.get_live(connection, id_or_key), body), 201)


@router.get(V2_ENTITLEMENTS)
def list_entitlements(
    id_or_key: IdOrKey,
    db: Db,
    page: Annotated[int, Query(ge=1)] = 1,
    page_size: Annotated[int, Query(alias="pageSize", ge=1, le=1000)] = 100,
) -> Response:
    """List the entitlements of a customer, one page at a time."""
    with db.reading() as connection:
        found = store.entitlements(connection, customers.get_live(connection, id_or_key)["id"])
    shown = found[(page - 1) * page_size : page * page_size]
    return answer({"items": shown, "page": page, "pageSize": page_size, "totalCount": len(found)})


@router.get(V2_ENTITLEMENTS + "/{id_or_feature}")
def get_entitlement(id_or_key: IdOrKey, id_or_feature: str, db: Db) -> Response:
    """Return an entitlement by its id or feature."""
    with db.reading() as connection:
        customer = customers.get_live(connection, id_or_key)
        return answer(store.get_entitlement(connection, customer["id"], id_or_feature))


@router.delete(V2_ENTITLEMENTS + "/{id_or_feature}")
def withdraw(id_or_key: IdOrKey, id_or_feature: str, db: Db) -> Response:
    """Delete an entitlement; 204."""
    with db.writing() as connection:
        store.withdraw(connection, customers.get_live(connection, id_or_key)["id"], id_or_feature)
    return no_content()


@router.get(V2_ENTITLEMENTS + "/{id_or_feature}/value")
def get_v2_value(id_or_key: IdOrKey, id_or_feature: str, db: Db) -> Response:
    """Return the value of an entitlement; `hasAccess` is left out where it is false."""
    with db.reading() as connection:
        customer = customers.get_live(connection, id_or_key)
        feature = store.get_entitlement(connection, customer["id"], id_or_feature)["featureKey"]
        return answer(_without_false_access(store.values(connection, customer["id"])[feature]))


def _without_false_access(value: dict[str, Any]) -> dict[str, Any]:
    # The real server leaves an empty (false) member out here, but not in v1's .../value.
    return {name: part for name, part in value.items() if name != "type" and part is not False}


@router.get(V3 + "/customers/{customer_id}/entitlement-access", tags=["v3"])
def list_entitlement_access(customer_id: Ulid, db: Db) -> Response:
    """List the features that a customer has access to: {data}."""
    with db.reading() as connection:
        if "deletedAt" in _by_id(connection, customer_id):
            detail = f"Customer is deleted [namespace={NAMESPACE} customer.id={customer_id}]"
            raise konnect(412, detail)
        found = store.values(connection, customer_id)
    names = {"type": "type", "hasAccess": "has_access", "config": "config"}
    return answer(
        {
            "data": [
                {"feature_key": key} | {names[name]: part for name, part in value.items() if name in names}
                for key, value in found.items()
            ]
        }
    )


class _Keys(V3Body):
    keys: list[str] = Field(min_length=1, max_length=MAX_KEYS)


class AccessQuery(V3Body):
    """EntitlementAccessQueryRequest; `include_credits` has no effect in the real server either."""

    customer: _Keys
    feature: _Keys | None = None
    include_credits: bool = False


@router.post(V3 + "/entitlement-access/query", tags=["v3"])
def query_access(
    body: AccessQuery,
    db: Db,
    size: Annotated[int, Query(alias="page[size]")] = MAX_KEYS,
    after: Annotated[str | None, Query(alias="page[after]")] = None,
) -> Response:
    """Tell for up to 100 keys or subjects whether their customers have access to features."""
    if not 1 <= size <= MAX_KEYS:
        raise bad_parameter("page[size]", f"must be between 1 and {MAX_KEYS}", source="query")
    start = None if after is None else _decoded(after)
    if "" in body.customer.keys:
        raise invalid("error getting customers by usage attribution: validation error: key cannot be empty")
    with db.reading() as connection:
        matched: dict[str, list[str]] = {}
        errors = []
        for key in body.customer.keys:
            customer_id = store.resolve(connection, key)
            if customer_id is None:
                unknown = {"code": "customer_not_found", "customer": key, "message": "customer not found"}
                errors.append(unknown)
            else:
                matched.setdefault(customer_id, []).append(key)
        found = [customers.get(connection, customer_id) for customer_id in matched]
        found.sort(key=_place)
        following = [customer for customer in found if start is None or _place(customer) > start]
        shown = following[:size]
        wanted = body.feature.keys if body.feature else None
        data = [_access(connection, customer, matched[customer["id"]], wanted) for customer in shown]
    page: dict[str, Any] = {"next": None, "previous": None, "size": size}
    if shown:
        page |= {"first": _cursor(shown[0]), "last": _cursor(shown[-1])}
        if len(following) > size:
            page["next"] = page["last"]
        if len(following) < len(found):
            page["previous"] = page["first"]
    return answer({"data": data, "errors": errors, "meta": {"page": page}})


_MESSAGES = {
    "usage_limit_reached": "usage limit for feature reached",
    "feature_unavailable": "feature is not available for customer",
    "feature_not_found": "feature is not found",
}


def _access(
    connection: sqlite3.Connection, customer: dict[str, Any], matched: list[str], wanted: list[str] | None
) -> dict[str, Any]:
    found = store.values(connection, customer["id"])
    known = {feature["key"] for feature in store.list_features(connection)}
    features: dict[str, Any] = {}
    for key in sorted(known) if wanted is None else wanted:
        if found.get(key, {}).get("hasAccess"):
            features[key] = {"has_access": True}
            continue
        code = "usage_limit_reached" if key in found else "feature_unavailable"
        code = code if key in known else "feature_not_found"
        features[key] = {"has_access": False, "reason": {"code": code, "message": _MESSAGES[code]}}
    shown = shapes.customer(customer)
    return {"customer": shown, "features": features, "matched": matched, "updated_at": now_rfc3339()}


def _place(customer: dict[str, Any]) -> tuple[str, str]:
    # The real server's cursors hold whole seconds.
    return customer["createdAt"][:19], customer["id"]


def _cursor(customer: dict[str, Any]) -> str:
    moment, customer_id = _place(customer)
    return base64.b64encode(f"{moment}Z,{customer_id}".encode()).decode()


def _decoded(cursor: str) -> tuple[str, str]:
    try:
        moment, customer_id = base64.b64decode(cursor, validate=True).decode().split(",")
    except (binascii.Error, ValueError) as error:
        raise bad_parameter("page[after]", f"decode cursor: {error}", source="query") from None
    return moment.removesuffix("Z"), customer_id


class CreateCredits(V3Body):
    """CreateCreditGrantRequest, as far as the sandbox keeps it."""

    name: str = Field(min_length=1)
    currency: str = Field(pattern="^[A-Z]{3}$")
    amount: str = Field(pattern=r"^[0-9]+(\.[0-9]+)?$")
    funding_method: Literal["none", "invoice", "external"] = "none"


@router.post(V3 + "/customers/{customer_id}/credits/grants", tags=["v3"])
def grant_credits(customer_id: Ulid, body: CreateCredits, db: Db) -> Response:
    """Give a customer credits; 201."""
    with db.writing() as connection:
        _by_id(connection, customer_id)
        return answer(store.grant_credits(connection, customer_id, body.model_dump()), 201)


@router.get(V3 + "/customers/{customer_id}/credits/grants", tags=["v3"])
def list_credit_grants(
    customer_id: Ulid,
    db: Db,
    size: Annotated[int, Query(alias="page[size]", ge=0)] = 20,
    number: Annotated[int, Query(alias="page[number]", ge=1)] = 1,
) -> Response:
    """List the credits that a customer was given; of a customer that is not there: none."""
    with db.reading() as connection:
        found = store.credit_grants(connection, customer_id)
    shown = found[(number - 1) * size : number * size] if size else found
    return answer({"data": shown, "meta": {"page": {"number": number, "size": size, "total": len(found)}}})


@router.get(V3 + "/customers/{customer_id}/credits/balance", tags=["v3"])
def get_credit_balance(request: Request, customer_id: Ulid, db: Db) -> Response:
    """Return the balance of a customer's credits by currency; of one that was asked for, also if it is 0."""
    currency = v3_filters(request, {"currency", "feature_key"}).get(("currency", "eq"))
    with db.reading() as connection:
        _by_id(connection, customer_id)
        found = store.credit_balances(connection, customer_id, currency)
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return answer({"balances": found, "retrieved_at": now})


def _by_id(connection: sqlite3.Connection, customer_id: str) -> dict[str, Any]:
    try:
        return customers.get(connection, customer_id)
    except ProblemError:
        raise not_found(f"customer with id {customer_id} not found in {NAMESPACE} namespace") from None
