"""What a customer has: its subscriptions, what it may use, and how much of that is left.

Read for one customer at a time. An edition of a server without such a path has nothing to say there, which is
not an error: Konnect has no v1, and a self-hosted v3 says whether a customer has access, but not how much is
left. Its v1 on the same address does (recordings of v1.0.0-beta.232: `GET /api/v1/customers/{id}/access`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.http.client import ApiClient, Params
from syncd.metering import answers
from syncd.metering.answers import PAGE_OF_PARTS, id_segment, mapping, text_or_none
from syncd.metering.base import Account, Credit, Entitlement, Subscription

_MAX_VALUES = 20
"""Features whose values are asked for one by one, where there is no other way."""


def read_v1(client: ApiClient, customer_id: str) -> Account:
    """Return what a customer has; three requests. Raises an ApiError."""
    path = f"/api/v1/customers/{id_segment(customer_id)}"
    page: Params = {"page": 1, "pageSize": PAGE_OF_PARTS}
    listed = answers.parts(client, f"{path}/subscriptions", "items", page)
    for entry in listed:
        answers.expect_among(entry.get("customerId"), {customer_id}, f"subscriptions of {customer_id}")
    access = answers.object_or_none(client, f"{path}/access") or {}
    found = _entitlements(access)
    if found:
        periods = answers.parts(
            client, f"/api/v2/customers/{id_segment(customer_id)}/entitlements", "items", page
        )
        for entry in periods:
            answers.expect_among(entry.get("customerId"), {customer_id}, f"entitlements of {customer_id}")
        found = _with_resets(found, periods)
    return Account(_subscriptions(listed, "activeFrom", "activeTo"), found)


def read_v3(client: ApiClient, v1: ApiClient | None, customer_id: str) -> Account:
    """Return what a customer has; `v1` is a client of the same server's v1, None for Konnect.

    Four requests, or one more for each metered feature. Raises an ApiError.
    """
    filters: Params = {"page[size]": PAGE_OF_PARTS, "page[number]": 1, "filter[customer_id][eq]": customer_id}
    listed = answers.parts(client, "/openmeter/subscriptions", "data", filters)
    for entry in listed:
        answers.expect_among(entry.get("customer_id"), {customer_id}, f"subscriptions of {customer_id}")
    path = f"/openmeter/customers/{id_segment(customer_id)}"
    access = answers.parts(client, f"{path}/entitlement-access", "data", None)
    metered = [str(entry.get("feature_key")) for entry in access if entry.get("type") == "metered"]
    figures = _figures(client, v1, customer_id, metered) if metered else {}
    found = []
    for entry in access:
        feature = str(entry.get("feature_key"))
        one = Entitlement(feature, entry.get("has_access") is True, config=text_or_none(entry.get("config")))
        found.append(_with_figures(one, figures.get(feature, {})))
    credit = _credits(client, f"{path}/credits/balance")
    return Account(_subscriptions(listed, "active_from", "active_to"), _sorted(found), credit)


def _figures(
    client: ApiClient, v1: ApiClient | None, customer_id: str, features: list[str]
) -> dict[str, dict[str, object]]:
    """Return the figures of metered features, in v1's spelling; none where the server has no such path."""
    if v1 is not None:
        path = f"/v1/customers/{id_segment(customer_id)}/access"
        access = mapping((answers.object_or_none(v1, path) or {}).get("entitlements"))
        return {feature: mapping(value) for feature, value in access.items()}
    path = f"/openmeter/customers/{id_segment(customer_id)}/entitlement-access/features"
    names = {"total_available_grant_amount": "totalAvailableGrantAmount"}
    found: dict[str, dict[str, object]] = {}
    for feature in features[:_MAX_VALUES]:
        value = answers.object_or_none(client, f"{path}/{answers.segment(feature, 'feature')}/value")
        if value is None:
            return found
        found[feature] = {names.get(name, name): part for name, part in value.items()}
    return found


def _entitlements(access: Mapping[str, object]) -> tuple[Entitlement, ...]:
    """Return the entitlements of v1's `access`, which leaves `hasAccess` out where it is false."""
    found = []
    for feature, part in mapping(access.get("entitlements")).items():
        value = mapping(part)
        one = Entitlement(feature, value.get("hasAccess") is True, config=text_or_none(value.get("config")))
        found.append(_with_figures(one, value))
    return _sorted(found)


def _with_figures(entitlement: Entitlement, value: Mapping[str, object]) -> Entitlement:
    return replace(
        entitlement,
        left=_figure(value.get("balance")),
        used=_figure(value.get("usage")),
        quota=_figure(value.get("totalAvailableGrantAmount")),
        overage=_figure(value.get("overage")),
    )


def _with_resets(
    entitlements: tuple[Entitlement, ...], periods: list[dict[str, object]]
) -> tuple[Entitlement, ...]:
    ends = {entry.get("featureKey"): mapping(entry.get("currentUsagePeriod")).get("to") for entry in periods}
    return tuple(replace(one, resets_at=_moment(ends.get(one.feature))) for one in entitlements)


def _subscriptions(listed: list[dict[str, object]], since: str, until: str) -> tuple[Subscription, ...]:
    found = []
    for entry in listed:
        if entry.get("status") == "inactive":
            continue
        plan = mapping(entry.get("plan"))
        found.append(
            Subscription(
                str(entry.get("id")),
                str(entry.get("name") or ""),
                text_or_none(plan.get("key")),
                answers.whole_or_none(plan.get("version")),
                str(entry.get("status") or ""),
                _moment(entry.get(since)),
                _moment(entry.get(until)),
            )
        )
    return tuple(found)


def _credits(client: ApiClient, path: str) -> tuple[Credit, ...]:
    """Return the credits; none from a server that has none or refuses to show them."""
    try:
        balance = answers.object_or_none(client, path) or {}
    except (RefusedError, UnauthorizedError):
        return ()
    listed = balance.get("balances")
    entries = [mapping(entry) for entry in listed] if isinstance(listed, list) else []
    return tuple(
        Credit(str(entry.get("currency")), str(entry.get("live")), str(entry.get("pending")))
        for entry in entries
    )


def _sorted(found: list[Entitlement]) -> tuple[Entitlement, ...]:
    return tuple(sorted(found, key=lambda one: one.feature))


def _figure(value: object) -> float | None:
    """Return a number, None if there is none: v1 sends numbers, v3 texts."""
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


def _moment(value: object) -> datetime | None:
    return answers.moment(value, "what a customer has") if value else None
