"""Features, entitlements and credits: what a customer has access to, and how much of it is left.

As the recordings of the real server show: usage counts as soon as its events are stored, a balance is never
negative, and credits do not decide about access (`include_credits` has no effect there either). Simpler than
there: the allowance of a metered entitlement is issued again in each period, and nothing is carried over.
"""

import sqlite3
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import orjson
from pydantic import Field

from syncd.sandbox.bodies import Body
from syncd.sandbox.problems import ProblemError, invalid, not_found
from syncd.sandbox.store import meters, usage
from syncd.sandbox.values import epoch_seconds, now_rfc3339, parse_time, rfc3339, ulid

_DAYS = {"DAY": 1, "WEEK": 7}
_MONTHS = {"MONTH": 1, "YEAR": 12}
_ISO = {"HOUR": "PT1H", "DAY": "P1D", "WEEK": "P1W", "MONTH": "P1M", "YEAR": "P1Y"}


class FeatureBody(Body):
    """FeatureCreateInputs, without the filters other than equality."""

    key: str = Field(pattern="^[a-z0-9]+(?:_[a-z0-9]+)*$", min_length=1, max_length=64)
    name: str
    meter_slug: str | None = None
    meter_group_by_filters: dict[str, str] | None = None


class UsagePeriodBody(Body):
    """RecurringPeriodCreateInput."""

    interval: Literal["HOUR", "DAY", "WEEK", "MONTH", "YEAR"]
    anchor: str | None = None


class EntitlementBody(Body):
    """EntitlementV2CreateInputs: metered, static or boolean."""

    type: Literal["metered", "static", "boolean"]
    feature_key: str
    config: str | None = None
    usage_period: UsagePeriodBody | None = None
    issue_after_reset: float = 0
    is_soft_limit: bool = False


def create_feature(connection: sqlite3.Connection, body: FeatureBody) -> dict[str, Any]:
    """Create a feature and return it in the shape of Feature. Raises the 404 of its meter and the 409."""
    if body.meter_slug is not None:
        meters.get(connection, body.meter_slug)
    now = now_rfc3339()
    document = {"id": ulid(), **body.document(), "createdAt": now, "updatedAt": now}
    try:
        connection.execute(
            "INSERT INTO features VALUES (?, ?, ?)",
            (document["id"], body.key, orjson.dumps(document).decode()),
        )
    except sqlite3.IntegrityError:
        found = get_feature(connection, body.key)
        raise ProblemError(409, f"feature {found['id']} with key {body.key} already exists") from None
    return document


def get_feature(connection: sqlite3.Connection, id_or_key: str) -> dict[str, Any]:
    """Return a feature. Raises the 404."""
    row = connection.execute("SELECT document FROM features WHERE ? IN (id, key)", (id_or_key,)).fetchone()
    if row is None:
        raise ProblemError(404, f"feature not found: {id_or_key}")
    found: dict[str, Any] = orjson.loads(row["document"])
    return found


def list_features(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """List all features, by key."""
    return [
        orjson.loads(row["document"]) for row in connection.execute("SELECT * FROM features ORDER BY key")
    ]


def entitle(
    connection: sqlite3.Connection, customer: dict[str, Any], body: EntitlementBody
) -> dict[str, Any]:
    """Give a customer an entitlement. Raises the 404 of its feature, the 409, and the 400 of a bad one."""
    feature = get_feature(connection, body.feature_key)
    taken = [e["id"] for e in entitlements(connection, customer["id"]) if e["featureKey"] == feature["key"]]
    if taken:
        raise ProblemError(
            409,
            f"entitlement with id {taken[0]} already exists for feature {feature['id']} and customer"
            f" {customer['id']}",
            members={"extensions": {"conflictingEntityId": taken[0]}},
        )
    now = now_rfc3339()
    document = {
        "id": ulid(),
        "type": body.type,
        "featureId": feature["id"],
        "featureKey": feature["key"],
        "customerId": customer["id"],
        "customerKey": customer.get("key", ""),
        "activeFrom": now,
        "createdAt": now,
        "updatedAt": now,
        **_details(body, feature, now),
    }
    connection.execute(
        "INSERT INTO entitlements VALUES (?, ?, ?, ?, ?)",
        (document["id"], customer["id"], feature["key"], orjson.dumps(document).decode(), now),
    )
    return _shown(document)


def _details(body: EntitlementBody, feature: dict[str, Any], now: str) -> dict[str, Any]:
    if body.type == "boolean":
        return {}
    if body.type == "static":
        if body.config is None:
            raise invalid("config is required for a static entitlement")
        return {"config": body.config}
    if body.usage_period is None:
        raise invalid("usagePeriod is required for a metered entitlement")
    if "meterSlug" not in feature:
        raise invalid(f"feature {feature['key']} has no meter")
    minute = rfc3339(epoch_seconds(parse_time(now)) // 60 * 60)
    interval = body.usage_period.interval
    return {
        "isSoftLimit": body.is_soft_limit,
        "issue": {"amount": _plain(body.issue_after_reset)},
        "issueAfterReset": _plain(body.issue_after_reset),
        "lastReset": minute,
        "measureUsageFrom": minute,
        "preserveOverageAtReset": False,
        "grantId": ulid(),
        "usagePeriod": {
            "anchor": body.usage_period.anchor or minute,
            "interval": interval,
            "intervalISO": _ISO[interval],
        },
    }


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    """Return an entitlement as the API shows it: with the period that is current now."""
    shown = {name: value for name, value in document.items() if name != "grantId"}
    if document["type"] == "metered":
        start, end = _period(document["usagePeriod"], time.time())
        shown["currentUsagePeriod"] = {"from": rfc3339(start), "to": rfc3339(end)}
        shown["lastReset"] = max(document["lastReset"], rfc3339(start))
    return shown


def withdraw(connection: sqlite3.Connection, customer_id: str, id_or_feature: str | None = None) -> None:
    """Remove an entitlement of a customer, or all of them. Raises the 404 of one that is not there."""
    if id_or_feature is not None:
        get_entitlement(connection, customer_id, id_or_feature)
    connection.execute(
        "DELETE FROM entitlements"
        " WHERE customer_id = :customer AND (:one IS NULL OR :one IN (id, feature_key))",
        {"customer": customer_id, "one": id_or_feature},
    )


def entitlements(connection: sqlite3.Connection, customer_id: str) -> list[dict[str, Any]]:
    """List the entitlements of a customer, in the order of their creation, as EntitlementV2."""
    return [_shown(document) for document in _documents(connection, customer_id)]


def _documents(connection: sqlite3.Connection, customer_id: str) -> list[dict[str, Any]]:
    rows = connection.execute(
        "SELECT document FROM entitlements WHERE customer_id = ? ORDER BY created_at, id", (customer_id,)
    )
    return [orjson.loads(row["document"]) for row in rows]


def get_entitlement(connection: sqlite3.Connection, customer_id: str, id_or_feature: str) -> dict[str, Any]:
    """Return an entitlement of a customer. Raises the 404."""
    for found in entitlements(connection, customer_id):
        if id_or_feature in (found["id"], found["featureKey"]):
            return found
    raise not_found(f"entitlement not found: {id_or_feature}")


def values(connection: sqlite3.Connection, customer_id: str) -> dict[str, dict[str, Any]]:
    """Return what a customer has access to, by feature, as EntitlementValue with the `type` added."""
    found = {document["featureKey"]: document for document in _documents(connection, customer_id)}
    return {key: _value(connection, customer_id, found[key]) for key in sorted(found)}


def _value(connection: sqlite3.Connection, customer_id: str, document: dict[str, Any]) -> dict[str, Any]:
    if document["type"] != "metered":
        config = {"config": document["config"]} if "config" in document else {}
        return {"type": document["type"], "hasAccess": True, **config}
    used = _usage(connection, customer_id, document)
    issued = Decimal(str(document["issueAfterReset"]))
    balance = max(issued - used, Decimal(0))
    return {
        "type": "metered",
        "hasAccess": bool(document["isSoftLimit"] or balance > 0),
        "balance": _plain(balance),
        "usage": _plain(used),
        "overage": _plain(max(used - issued, Decimal(0))),
        "totalAvailableGrantAmount": _plain(issued),
        "grantBalances": {document["grantId"]: _plain(balance)} if issued else {},
    }


def _usage(connection: sqlite3.Connection, customer_id: str, document: dict[str, Any]) -> Decimal:
    """Return the usage of the current period so far, by the meter of the feature."""
    feature = get_feature(connection, document["featureKey"])
    start, end = _period(document["usagePeriod"], time.time())
    wanted = usage.Query(
        time_from=max(start, epoch_seconds(parse_time(document["measureUsageFrom"]))),
        time_to=end,
        customer_ids=[customer_id],
        group_filters=feature.get("meterGroupByFilters", {}),
    )
    rows = usage.query(connection, meters.get(connection, feature["meterSlug"]), wanted)
    return sum((Decimal(str(row["value"])) for row in rows), Decimal(0))


def _period(period: dict[str, Any], now: float) -> tuple[int, int]:
    """Return the start and the end of the period that is current at a time, in seconds since 1970."""
    interval, anchor = period["interval"], parse_time(period["anchor"]).astimezone(UTC)
    number = 0
    if interval in _MONTHS:
        elapsed = datetime.fromtimestamp(now, UTC)
        number = (elapsed.year - anchor.year) * 12 + elapsed.month - anchor.month
        number //= _MONTHS[interval]
    else:
        length = 3600 if interval == "HOUR" else _DAYS[interval] * 86_400
        number = int((now - anchor.timestamp()) // length)
    if _at(anchor, interval, number).timestamp() > now:
        number -= 1
    return (
        epoch_seconds(_at(anchor, interval, number)),
        epoch_seconds(_at(anchor, interval, number + 1)),
    )


def _at(anchor: datetime, interval: str, number: int) -> datetime:
    if interval == "HOUR":
        return anchor + timedelta(hours=number)
    if interval in _DAYS:
        return anchor + timedelta(days=number * _DAYS[interval])
    years, month = divmod(anchor.month - 1 + number * _MONTHS[interval], 12)
    day = anchor.day
    while True:
        try:
            return anchor.replace(year=anchor.year + years, month=month + 1, day=day)
        except ValueError:  # the month is shorter
            day -= 1


def _plain(number: Decimal | float) -> int | float:
    return int(number) if number == int(number) else float(number)


def grant_credits(connection: sqlite3.Connection, customer_id: str, given: dict[str, Any]) -> dict[str, Any]:
    """Give a customer credits, and return them in the shape of CreditGrant."""
    now = now_rfc3339()
    document = {
        "id": ulid(),
        "labels": {},
        "priority": 10,
        "status": "active",
        "tax_config": {"tax_code": {"id": ulid()}},
        "created_at": now,
        "updated_at": now,
        **given,
        "amount": _decimal(Decimal(given["amount"])),
    }
    connection.execute(
        "INSERT INTO credits VALUES (?, ?, ?)", (document["id"], customer_id, orjson.dumps(document).decode())
    )
    return document


def credit_grants(connection: sqlite3.Connection, customer_id: str) -> list[dict[str, Any]]:
    """List the credits that a customer was given."""
    rows = connection.execute("SELECT * FROM credits WHERE customer_id = ? ORDER BY id", (customer_id,))
    return [orjson.loads(row["document"]) for row in rows]


def credit_balances(
    connection: sqlite3.Connection, customer_id: str, currency: str | None
) -> list[dict[str, Any]]:
    """Return the balance of a customer's credits by currency; the sandbox prices nothing."""
    totals: dict[str, Decimal] = {} if currency is None else {currency: Decimal(0)}
    for grant in credit_grants(connection, customer_id):
        if currency in (None, grant["currency"]):
            totals[grant["currency"]] = totals.get(grant["currency"], Decimal(0)) + Decimal(grant["amount"])
    return [
        {"currency": name, "live": _decimal(total), "pending": "0", "settled": _decimal(total)}
        for name, total in sorted(totals.items())
    ]


def spend_credits(connection: sqlite3.Connection, customer_id: str) -> None:
    """Take all credits of a customer away, as if they were spent."""
    connection.execute("DELETE FROM credits WHERE customer_id = ?", (customer_id,))


def _decimal(number: Decimal) -> str:
    return format(number.normalize(), "f") if number else "0"


def resolve(connection: sqlite3.Connection, key: str) -> str | None:
    """Return the id of the customer that a key or a subject belongs to: the key's owner comes first."""
    row = connection.execute(
        "SELECT customer_id FROM attribution WHERE subject = ? ORDER BY role LIMIT 1", (key,)
    ).fetchone()
    return None if row is None else str(row["customer_id"])
