"""The gate in the operations API: its view, its overrides and its metrics, asked of it over its socket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from fastapi import APIRouter, HTTPException, Response

from openmeter_plugin.gate.overrides import OverrideRequest

_SECONDS: Final = 5.0


class GateError(Exception):
    """The gate does not answer, or refuses; `status` is that of the answer to give."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class GateClient:
    """Client of the gate's socket. It blocks for a few seconds at most."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def view(self) -> dict[str, Any]:
        """Return what the gate shows of itself; raises GateError."""
        found: dict[str, Any] = self._ask("GET", "/v1/gate").json()
        return found

    def allow(self, body: dict[str, Any]) -> dict[str, Any]:
        """Set an override; raises GateError."""
        found: dict[str, Any] = self._ask("POST", "/v1/gate/overrides", json=body).json()
        return found

    def end(self, subject: str) -> None:
        """End an override; raises GateError."""
        self._ask("DELETE", "/v1/gate/overrides", params={"subject": subject})

    def _ask(self, method: str, path: str, **parts: Any) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(self._socket))
        try:
            with httpx.Client(transport=transport, timeout=_SECONDS) as client:
                answer = client.request(method, f"http://gate{path}", **parts)
        except httpx.HTTPError:
            raise GateError(503, "the gate does not answer: see the log of the process gate") from None
        if not answer.is_success:
            detail = answer.json().get("detail", "") if answer.content else ""
            raise GateError(answer.status_code, str(detail))
        return answer


def add_gate_routes(router: APIRouter, gate: GateClient | None) -> None:
    """Add the routes; without a gate they answer 404."""

    def client() -> GateClient:
        if gate is None:
            raise HTTPException(404, "this plugin server runs without a gate: see serve --gate")
        return gate

    @router.get("/v1/gate")
    def view() -> dict[str, Any]:
        """Return who is stopped, who is close to the limit, the overrides and the gate's figures."""
        try:
            return client().view()
        except GateError as error:
            raise HTTPException(error.status, str(error)) from None

    @router.post("/v1/gate/overrides", status_code=201)
    def allow(body: OverrideRequest) -> dict[str, Any]:
        """Allow a subject, and all subjects of its customer, everything for a time."""
        try:
            return client().allow(body.model_dump())
        except GateError as error:
            raise HTTPException(error.status, str(error)) from None

    @router.delete("/v1/gate/overrides", status_code=204)
    def end(subject: str) -> Response:
        """End an override now."""
        try:
            client().end(subject)
        except GateError as error:
            raise HTTPException(error.status, str(error)) from None
        return Response(status_code=204)


class Figure(NamedTuple):
    """A metric of the gate: samples by their label values."""

    name: str
    help_text: str
    is_counter: bool
    labels: list[str]
    samples: Mapping[Any, float]


def gate_figures(gate: GateClient) -> Iterator[Figure]:
    """Yield the metrics of the gate; only `gate_up` if it does not answer."""
    try:
        figures = gate.view()["figures"]
    except GateError:
        yield Figure("gate_up", _UP, False, [], {(): 0})
        return
    yield Figure("gate_up", _UP, False, [], {(): 1})
    decisions = {(feature, reason, mode): count for feature, reason, mode, count in figures["decisions"]}
    yield Figure(
        "gate_decisions",
        "Requests that the gate stopped, or would have stopped in the mode shadow",
        True,
        ["feature", "reason", "mode"],
        decisions,
    )
    calls = {(call, outcome): count for call, outcome, count in figures["calls"]}
    yield Figure(
        "gate_calls",
        "Calls to the metering API by the status of the answer, or `unreachable`",
        True,
        ["call", "outcome"],
        {("query", "200"): 0.0} | calls,
    )
    overshoot = {(feature,): amount for feature, amount in figures["overshoot"].items()}
    yield Figure(
        "gate_overshoot", "The most that a customer used beyond its end", False, ["feature"], overshoot
    )
    for name, help_text in _PLAIN.items():
        yield Figure(f"gate_{name}", help_text, False, [], {(): figures[name.removesuffix("_seconds")]})
    yield Figure("gate_kongs", "Kongs that asked for the feed lately", False, [], {(): len(figures["kongs"])})


_UP: Final = "Whether the gate answers; if 0, its other metrics are missing"
_PLAIN: Final = {
    "state_age_seconds": "Age of the oldest reading of an active subject",
    "backlog_seconds": "How late the questions about access are; above 0 for long, max_calls is too low",
    "subjects": "Subjects that the gate knows",
    "overrides": "Overrides in force",
}
