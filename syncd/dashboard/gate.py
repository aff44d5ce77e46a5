"""The page of the gates: whom they stop, and overrides, which are set and ended by its forms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from syncd.core.errors import GatewayError
from syncd.dashboard.health import gateway_named, quick_client
from syncd.dashboard.queries import Queries
from syncd.dashboard.web import Visitor, Web, url
from syncd.gateways.client import Gateway

_log = structlog.get_logger("syncd.dashboard")

MAX_HOURS: Final = 31 * 24
"""The plugin's API allows no longer override."""
_LONGEST: Final = {"subject": 1024, "why": 500, "by": 200}


class GatePages:
    """Renders the page, and sets and ends overrides."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def show(self, _request: Request, visitor: Visitor) -> Response:
        """Show whom each gate stops or would stop, who is close to the limit, and overrides."""
        return self._web.render(visitor, "gate.html", gates=self._queries.gates(), max_hours=MAX_HOURS)

    def allow(self, request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Let a subject pass for some hours."""
        texts = {name: form.get(name, "").strip() for name in _LONGEST}
        seconds = _seconds(form.get("hours", ""))
        if seconds is None or not all(texts.values()) or any(len(texts[it]) > _LONGEST[it] for it in texts):
            return self._web.error(
                400,
                "Invalid form",
                f"It needs a subject, a number of hours up to {MAX_HOURS}, a reason and a name. Nothing was"
                " changed.",
            )

        def change(gateway: Gateway) -> None:
            gateway.allow(texts["subject"], seconds, texts["why"], texts["by"])
            _log.warning("override_set", gateway=gateway.name, seconds=seconds, **texts)

        return self._change(request, change)

    def end(self, request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """End an override now; one that has ended already is as good."""
        subject = form.get("subject", "")

        def change(gateway: Gateway) -> None:
            gateway.end_override(subject)
            _log.warning("override_ended", gateway=gateway.name, subject=subject)

        return self._change(request, change)

    def _change(self, request: Request, change: Callable[[Gateway], None]) -> Response:
        name = request.path_params["name"]
        found = gateway_named(self._queries.config(), name)
        if found is None:
            return self._web.no_such_gateway()
        index, config = found
        try:
            with closing(quick_client(config, index)) as gateway:
                change(gateway)
        except GatewayError as error:
            return self._web.error(
                502,
                "The override may not have changed",
                f"{error}. The page of the gate shows what is in force.",
            )
        finally:
            self._queries.forget_gateway(name)
        return RedirectResponse(url("gate"), 303)


def _seconds(hours: str) -> float | None:
    try:
        found = float(hours)
    except ValueError:
        return None
    return found * 3600 if 0 < found <= MAX_HOURS else None
