"""The pages of dead letters: by the metering API's answer, one with its event, and what replays did.

A replay changes the gateway's books once and is asked for once: a form that is sent twice, two people at a
time, or a gateway that answers too late never send an event twice, because the plugin marks each dead letter
for one replay.
"""

from __future__ import annotations

import re
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from syncd.core.errors import GatewayError
from syncd.dashboard.health import gateway_named, quick_client
from syncd.dashboard.pages import integer
from syncd.dashboard.queries import Queries
from syncd.dashboard.text import moment
from syncd.dashboard.web import Visitor, Web, url
from syncd.gateways.client import Gateway
from syncd.gateways.models import DeadLetterGroups, Replays

_log = structlog.get_logger("syncd.dashboard")

_PER_PAGE: Final = 50
_REPLAYS: Final = 10
_GROUP: Final = re.compile("[0-9a-f]{16}")
_LATEST: Final = 2**63 - 1


class DeadLetterPages:
    """Renders the pages, and replays."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def show(self, _request: Request, visitor: Visitor) -> Response:
        """Show the dead letters of all gateways by the answer, and the latest replays."""
        gateways = self._queries.of_gateways("dead letters", _groups_and_replays)
        return self._web.render(visitor, "dead_letters.html", gateways=gateways)

    def of_gateway(self, request: Request, visitor: Visitor) -> Response:
        """Show the dead letters of one gateway, of all or of one group."""
        name, after = request.path_params["name"], integer(request.query_params.get("after"), 0)
        group = _group(request.query_params.get("group"))
        answer = self._queries.of_gateway(
            name, f"dead letters {group} {after}", lambda api: api.dead_letters(after, _PER_PAGE, group)
        )
        if answer is None:
            return self._web.no_such_gateway()
        return self._web.render(
            visitor, "dead_letters_list.html", name=name, group=group, after=after, answer=answer
        )

    def one(self, request: Request, visitor: Visitor) -> Response:
        """Show one dead letter with its event and the whole answer."""
        name, number = request.path_params["name"], integer(request.path_params["number"], 0)
        answer = self._queries.of_gateway(
            name, f"dead letter {number}", lambda api: api.dead_letter(number), fresh=0
        )
        if answer is None:
            return self._web.no_such_gateway()
        event = _indented(answer.value.event) if answer.value else ""
        return self._web.render(
            visitor, "dead_letter.html", name=name, number=number, answer=answer, event=event
        )

    def replayed(self, request: Request, visitor: Visitor) -> Response:
        """Show what became of a replay; refreshes itself until it is over."""
        name, number = request.path_params["name"], integer(request.path_params["number"], 0)
        answer = self._queries.of_gateway(
            name, f"replay {number}", lambda api: api.replay_status(number), fresh=0
        )
        if answer is None:
            return self._web.no_such_gateway()
        live = request.query_params.get("live") != "off"
        busy = answer.value is not None and answer.value.waiting > 0
        if not busy:
            self._queries.forget_gateway(name)
        return self._web.render(
            visitor,
            "replay.html",
            name=name,
            number=number,
            answer=answer,
            live=live,
            refresh=_refresh(answer.value.asked_at if answer.value else "") if live and busy else None,
        )

    def replay(self, request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Replay one dead letter, a group or all, and redirect to the replay's page."""
        name = request.path_params["name"]
        found = gateway_named(self._queries.config(), name)
        if found is None:
            return self._web.no_such_gateway()
        selection = _selection(form)
        if selection is None:
            return self._web.error(400, "Invalid form", "It names no dead letters. Nothing was replayed.")
        index, config = found
        try:
            with closing(quick_client(config, index)) as gateway:
                replay = gateway.replay(selection)
        except GatewayError as error:
            return self._web.error(
                502,
                "The replay may not have begun",
                f"{error}. No event is lost, and none is sent twice: what the gateway has marked is replayed"
                " once, the rest are still dead letters. Look at them before you replay again.",
            )
        finally:
            self._queries.forget_gateway(name)
        _log.info("dead_letters_replayed", gateway=name, replay=replay.id, marked=replay.marked)
        if replay.id is None:
            return self._web.error(
                409,
                "Nothing to replay",
                "These dead letters are delivered, or wait for a replay already: the form was sent twice.",
            )
        return RedirectResponse(url("dead-letters", name, "replays", str(replay.id)), 303)


def _groups_and_replays(api: Gateway) -> tuple[DeadLetterGroups, Replays]:
    return api.dead_letter_groups(), api.replays(_REPLAYS)


def _selection(form: dict[str, str]) -> dict[str, object] | None:
    """Return what the form selects, as the plugin's API takes it; None if it selects nothing."""
    up_to = integer(form.get("up_to"), _LATEST)
    if number := integer(form.get("id"), 0):
        return {"ids": [number]}
    if group := _group(form.get("group")):
        return {"group": group, "up_to": up_to}
    return {"all": True, "up_to": up_to} if "all" in form else None


def _group(text: str | None) -> str | None:
    return text if text and _GROUP.fullmatch(text) else None


def _refresh(asked_at: str) -> int:
    """Return the refresh interval in seconds: short at first, because most replays are."""
    asked = moment(asked_at) or datetime.now(UTC)
    return 1 if (datetime.now(UTC) - asked).total_seconds() < 10 else 5


def _indented(document: dict[str, Any]) -> str:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
