"""Metering targets of both dialects, and manual changes on the server behind them."""

from __future__ import annotations

import httpx

from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.metering.v1 import OpenMeterV1
from syncd.metering.v3 import OpenMeterV3

OWNERSHIP = {"managed-by": "kong-openmeter", "sync-owner": "default", "source-id": "1"}

Target = OpenMeterV1 | OpenMeterV3


def _endpoint(url: str, token: str | None = None, timeout: float = 5) -> Endpoint:
    return Endpoint("metering", url, "metering.token", "read and write", token=token, timeout=timeout)


def _retry() -> Retry:
    return Retry(attempts=3, first_wait=0.001, longest_wait=0.002)


def target_at(url: str, *, timeout: float = 5) -> OpenMeterV1:
    return OpenMeterV1(_endpoint(url, timeout=timeout), _retry())


def v3_target_at(url: str) -> OpenMeterV3:
    """Open a v3 target; `url` ends before /openmeter/..."""
    return OpenMeterV3(_endpoint(url), _retry())


def target_with(dialect: str, url: str) -> Target:
    """Open a target on a scripted server; `url` ends before the dialect's paths."""
    kind = OpenMeterV3 if dialect == "openmeter-v3" else OpenMeterV1
    return kind(_endpoint(url), _retry())


def open_target(dialect: str, url: str, *, token: str | None = None, timeout: float = 5) -> Target:
    """Open a target on a sandbox."""
    url = url.rstrip("/")
    if dialect == "openmeter-v3":
        return OpenMeterV3(_endpoint(f"{url}/api/v3", token, timeout), _retry())
    return OpenMeterV1(_endpoint(url, token, timeout), _retry())


def fault(sandbox: httpx.Client, **fault: object) -> None:
    sandbox.post("/sandbox/v1/faults", json=fault).raise_for_status()


def by_hand(sandbox: httpx.Client, **body: object) -> dict[str, object]:
    """Create a customer as a person does, without syncd."""
    answer = sandbox.post("/api/v1/customers", json=body)
    answer.raise_for_status()
    document: dict[str, object] = answer.json()
    return document


def subscribe(sandbox: httpx.Client, key: str) -> None:
    sandbox.post(f"/sandbox/v1/customers/{key}/subscriptions").raise_for_status()
