"""The routes of the dashboard as one ASGI application, to be mounted at `web.ROOT`."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ExceptionHandler

from syncd.config.settings import Config
from syncd.dashboard.actions import Actions
from syncd.dashboard.pages import Pages
from syncd.dashboard.queries import Queries
from syncd.dashboard.session import SecureHeaders
from syncd.dashboard.web import Web
from syncd.runs.history import History
from syncd.runs.queue import RunQueue


def create_dashboard(
    runs: RunQueue,
    history: History,
    config: Callable[[], Config],
    token: Callable[[], str | None],
    schedule: Callable[[], dict[str, object]],
) -> Starlette:
    """Return the dashboard of a daemon; `token` and `schedule` are asked for anew each time."""
    web = Web(token, config, schedule)
    queries = Queries(runs, history, config)
    pages, actions = Pages(web, queries), Actions(web, queries)
    shown = {
        "/": pages.overview,
        "/runs": pages.runs,
        "/runs/{run_id}": pages.run,
        "/customers": pages.customers,
        "/unbilled": pages.unbilled,
        "/gateways": pages.gateways,
        "/gateways/{name}": pages.dead_letters,
    }
    done = {
        "/logout": actions.logout,
        "/resync": actions.preview,
        "/runs/{run_id}/apply": actions.apply,
    }
    routes = [
        *(Route(path, web.page(page), methods=["GET"]) for path, page in shown.items()),
        *(Route(path, web.action(action), methods=["POST"]) for path, action in done.items()),
        Route("/login", actions.login_form, methods=["GET"]),
        Route("/login", web.action(actions.login, needs_login=False), methods=["POST"]),
        Route("/static/{name}", web.static, methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(SecureHeaders)], exception_handlers=_handlers(web))


def _handlers(web: Web) -> dict[int | type[Exception], ExceptionHandler]:
    async def refused(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        title = {404: "There is no such page", 405: "This cannot be asked for so"}.get(status, "Refused")
        return web.error(status, title, "Go to the overview and take the way from there.")

    async def crashed(_request: Request, _error: Exception) -> Response:
        return web.error(500, "A mistake of ours", "The daemon's log has the details.")

    return {HTTPException: refused, Exception: crashed}
