"""The dashboard's routes as one ASGI application, to be mounted at `web.ROOT`."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ExceptionHandler

from syncd.close.store import ClosedMonths
from syncd.config.settings import Config
from syncd.core.errors import StateError
from syncd.customers.directory import Directory
from syncd.dashboard.actions import Actions
from syncd.dashboard.close import ClosePages
from syncd.dashboard.customers import CustomersPages
from syncd.dashboard.dead_letters import DeadLetterPages
from syncd.dashboard.gate import GatePages
from syncd.dashboard.overview import OverviewPage
from syncd.dashboard.pages import Pages
from syncd.dashboard.quarantine import QuarantinePages
from syncd.dashboard.queries import Queries
from syncd.dashboard.session import LoginLimit, SecureHeaders, Sessions
from syncd.dashboard.unbilled import UnbilledPages
from syncd.dashboard.usage import UsagePage
from syncd.dashboard.web import Web
from syncd.runs.history import History
from syncd.runs.queue import RunQueue
from syncd.state.database import State
from syncd.usage.report import Reports
from syncd.usage.store import UsageStore


def create_dashboard(
    runs: RunQueue,
    history: History,
    config: Callable[[], Config],
    token: Callable[[], str | None],
    schedule: Callable[[], dict[str, object]],
    limit: LoginLimit,
    session_idle: float,
    state: State,
    reports: Reports,
) -> Starlette:
    """Return the dashboard of a daemon; `token` and `schedule` are called for each request.

    The HTTP API shares `limit`, so that there is no second door to guess the token at. Sessions end after
    `session_idle` seconds without a request.
    """
    web = Web(token, config, schedule, limit, Sessions(idle=session_idle))
    queries = Queries(runs, history, config)
    directory, usage = Directory(state), UsageStore(state)
    pages, actions = Pages(web, queries), Actions(web, queries)
    unbilled = UnbilledPages(web, queries, history.ignored, directory, usage)
    gate = GatePages(web, queries)
    close = ClosePages(web, ClosedMonths(state))
    customers = CustomersPages(web, queries, directory, history, usage)
    dead_letters, quarantine = DeadLetterPages(web, queries), QuarantinePages(web, queries)
    page_routes = {
        "/": OverviewPage(web, queries).show,
        "/usage": UsagePage(web, reports).show,
        "/runs": pages.runs,
        "/runs/{run_id}": pages.run,
        "/customers": customers.table,
        "/customers/{key:path}": customers.one,
        "/unbilled": unbilled.show,
        "/unbilled/subject": unbilled.subject,
        "/close": close.show,
        "/close/{name}": close.download,
        "/gateways": pages.gateways,
        "/gate": gate.show,
        "/dead-letters": dead_letters.show,
        "/dead-letters/{name}": dead_letters.of_gateway,
        "/dead-letters/{name}/replays/{number}": dead_letters.replayed,
        "/dead-letters/{name}/{number}": dead_letters.one,
        "/quarantine": quarantine.show,
        "/quarantine/{name}": quarantine.of_gateway,
    }
    form_routes = {
        "/logout": actions.logout,
        "/unbilled/ignore": unbilled.ignore,
        "/unbilled/stop-ignoring": unbilled.stop_ignoring,
        "/unbilled/assign": unbilled.assign,
        "/resync": actions.preview,
        "/dead-letters/{name}/replay": dead_letters.replay,
        "/gate/{name}/allow": gate.allow,
        "/gate/{name}/end": gate.end,
        "/runs/{run_id}/apply": actions.apply,
    }
    routes = [
        *(Route(path, web.page(page), methods=["GET"]) for path, page in page_routes.items()),
        *(Route(path, web.action(action), methods=["POST"]) for path, action in form_routes.items()),
        Route("/login", actions.login_form, methods=["GET"]),
        Route("/login", web.action(actions.login, needs_login=False), methods=["POST"]),
        Route("/static/{name}", web.static, methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(SecureHeaders)], exception_handlers=_handlers(web))


def _handlers(web: Web) -> dict[int | type[Exception], ExceptionHandler]:
    async def refused(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        title = {404: "Page not found", 405: "Method not allowed"}.get(status, "Request refused")
        return web.error(status, title, "Start from the overview.")

    async def without_state(_request: Request, error: Exception) -> Response:
        return web.error(503, "The state cannot be used", str(error))

    async def crashed(_request: Request, _error: Exception) -> Response:
        return web.error(500, "Internal error", "The daemon's log has the details.")

    return {HTTPException: refused, StateError: without_state, Exception: crashed}
