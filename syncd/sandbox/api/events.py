"""POST and GET of events, in both dialects."""

import base64
import binascii
import time
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from syncd.sandbox.api.common import (
    Db,
    FaultsInForce,
    Moment,
    Options,
    RejectedCounts,
    answer,
    no_content,
    seconds,
    v3_filters,
)
from syncd.sandbox.cloudevents import read_events, split_body
from syncd.sandbox.faults import Faults
from syncd.sandbox.problems import ProblemError, bad_parameter, invalid
from syncd.sandbox.settings import Settings
from syncd.sandbox.store import events as store
from syncd.sandbox.store.database import Database
from syncd.sandbox.values import rfc3339

LOOK_BACK_SECONDS = 32 * 24 * 3600
"""How far back GET looks: openmeter/meterevent/service.go, MaximumFromDuration."""

router = APIRouter(tags=["Events"])


@router.post("/api/v1/events")
async def ingest_events(
    request: Request, db: Db, faults: FaultsInForce, rejected: RejectedCounts, options: Options
) -> Response:
    """Ingest one event or a batch; 204. One bad event refuses the whole batch with 400."""
    return await _ingest(request, Ingest(db, faults, rejected, options), v3=False)


@router.post("/api/v3/openmeter/events", tags=["v3"])
async def ingest_v3_events(
    request: Request, db: Db, faults: FaultsInForce, rejected: RejectedCounts, options: Options
) -> Response:
    """Ingest one event or a batch; 202. One bad event refuses the whole batch with 400."""
    return await _ingest(request, Ingest(db, faults, rejected, options), v3=True)


@dataclass(frozen=True, slots=True)
class Ingest:
    """What taking events needs."""

    db: Database
    faults: Faults
    rejected: Counter[str]
    options: Settings


async def _ingest(request: Request, ingest: Ingest, *, v3: bool) -> Response:
    content_type = request.headers.get("content-type", "")
    try:
        body = await request.body()
    except ClientDisconnect:  # the sender was killed, so the answer goes nowhere
        return Response(status_code=400)
    await run_in_threadpool(_take, ingest, content_type, body, v3=v3)
    return Response(status_code=202) if v3 else no_content()


def _take(ingest: Ingest, content_type: str, body: bytes, *, v3: bool) -> None:
    documents = split_body(content_type, body, exactly=not v3)
    try:
        events = read_events(documents, only_known=v3)
    except ProblemError:
        ingest.rejected["events"] += len(documents) if isinstance(documents, list) else 1
        raise
    poison = ingest.faults.poison()
    taken = list(takewhile(lambda event: event.id not in poison, events))
    with ingest.db.writing() as connection:
        flush = store.current_flush(ingest.options.flush_seconds)
        store.store(connection, taken, flush, dedupe=ingest.options.dedupe)
    if len(taken) < len(events):
        refused = events[len(taken)].id
        ingest.faults.event_refused(refused)
        ingest.rejected["events"] += len(events) - len(taken)
        raise ProblemError(poison[refused], f"event {refused} is refused: injected by a test")


@router.get("/api/v1/events")
def list_events(
    db: Db,
    time_from: Annotated[Moment | None, Query(alias="from")] = None,
    time_to: Annotated[Moment | None, Query(alias="to")] = None,
    ingested_from: Annotated[Moment | None, Query(alias="ingestedAtFrom")] = None,
    ingested_to: Annotated[Moment | None, Query(alias="ingestedAtTo")] = None,
    event_id: Annotated[str | None, Query(alias="id")] = None,
    subject: str | None = None,
    customer_ids: Annotated[list[str], Query(alias="customerId")] = [],  # noqa: B006 - FastAPI copies it
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    _client_id: Annotated[str | None, Query(alias="clientId", min_length=1, max_length=36)] = None,
) -> Response:
    """List the latest events of the last 32 days or of the requested period."""
    oldest = int(time.time()) - LOOK_BACK_SECONDS
    since = seconds(time_from)
    if since is not None and since < oldest:
        raise invalid(f"from date is too old: {time_from}, must be after {rfc3339(oldest)}")
    until = seconds(time_to)
    if until is not None and until < (oldest if since is None else since):
        raise invalid(f"to date is before from date: {time_to}")
    wanted = store.EventFilter(
        time_from=oldest if since is None else since,
        time_to=until,
        ingested_from=seconds(ingested_from),
        ingested_to=seconds(ingested_to),
        id=event_id,
        subject=subject,
        customer_ids=customer_ids,
        limit=limit,
    )
    with db.reading() as connection:
        return answer(store.list_events(connection, wanted))


@router.get("/api/v3/openmeter/events", tags=["v3"])
def list_v3_events(
    request: Request,
    db: Db,
    size: Annotated[int, Query(alias="page[size]")] = 20,
    after: Annotated[str | None, Query(alias="page[after]")] = None,
    sort: str = "time desc",
) -> Response:
    """List the events of the last 32 days in pages: `next` is the cursor for `page[after]`."""
    if not 1 <= size <= MAX_PAGE:
        raise bad_parameter("page[size]", f"must be between 1 and {MAX_PAGE}", source="query")
    filters = v3_filters(request, {"id", "subject", "type", "source", "customer_id", "time"})
    wanted = store.EventFilter(
        time_from=_lower_bound(filters),
        time_to=_bound(filters, "lt"),
        id=filters.get(("id", "contains")),
        id_is=filters.get(("id", "eq")),
        subject=filters.get(("subject", "eq")),
        type_is=filters.get(("type", "eq")),
        source_is=filters.get(("source", "eq")),
        customer_ids=[filters["customer_id", "eq"]] if ("customer_id", "eq") in filters else [],
        ascending=sort.endswith(" asc"),
        after=None if after is None else _decoded(after),
        limit=size,
    )
    with db.reading() as connection:
        shown = store.page_of_events(connection, wanted)
    page: dict[str, Any] = {"next": None, "previous": None, "size": size}
    if shown:
        page |= {"first": _cursor(shown[0][0]), "last": _cursor(shown[-1][0])}
    if len(shown) == size:  # also if nothing follows: then the next page is empty
        page["next"] = page["last"]
    return answer({"data": [_v3_event(event) for _, event in shown], "meta": {"page": page}})


MAX_PAGE = 100


def _lower_bound(filters: dict[tuple[str, str], str]) -> int:
    oldest = int(time.time()) - LOOK_BACK_SECONDS
    return max(oldest, _bound(filters, "gte") or oldest)


def _bound(filters: dict[tuple[str, str], str], operator: str) -> int | None:
    try:
        return seconds(filters.get(("time", operator)))
    except ValueError as error:
        raise bad_parameter("filter", str(error), rule="format", source="query") from None


def _cursor(place: tuple[int, int]) -> str:
    return base64.b64encode(f"{rfc3339(place[0])},{place[1]}".encode()).decode()


def _decoded(cursor: str) -> tuple[int, int]:
    try:
        moment, row = base64.b64decode(cursor, validate=True).decode().split(",")
        return seconds(moment) or 0, int(row)
    except (binascii.Error, ValueError) as error:
        raise bad_parameter("page[after]", f"decode cursor: {error}", source="query") from None


def _v3_event(item: dict[str, Any]) -> dict[str, Any]:
    shown = {"event": item["event"], "ingested_at": item["ingestedAt"], "stored_at": item["storedAt"]}
    if "customerId" in item:
        shown["customer"] = {"id": item["customerId"]}
    if "validationError" in item:
        shown["validation_errors"] = [
            {"code": "validation_error", "message": text} for text in item["validationError"].split("\n")
        ]
    return shown
