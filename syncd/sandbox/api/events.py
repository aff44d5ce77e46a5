"""POST and GET /api/v1/events."""

import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from syncd.sandbox.api.common import Db, FaultsInForce, Moment, RejectedCounts, answer, no_content, seconds
from syncd.sandbox.cloudevents import read_events, split_body
from syncd.sandbox.faults import Faults
from syncd.sandbox.problems import ProblemError, invalid
from syncd.sandbox.store import events as store
from syncd.sandbox.store.database import Database
from syncd.sandbox.values import rfc3339

LOOK_BACK_SECONDS = 32 * 24 * 3600
"""How far back GET looks: openmeter/meterevent/service.go, MaximumFromDuration."""

router = APIRouter(tags=["Events"])


@router.post("/api/v1/events")
async def ingest_events(
    request: Request, db: Db, faults: FaultsInForce, rejected: RejectedCounts
) -> Response:
    """Ingest one event or a batch; 204.

    A batch is not atomic: if one event is invalid, those before it are stored and the answer is 400.
    """
    content_type = request.headers.get("content-type", "")
    try:
        body = await request.body()
    except ClientDisconnect:  # the sender was killed, so the answer goes nowhere
        return Response(status_code=400)
    refused = await run_in_threadpool(_ingest, db, faults, content_type, body)
    if refused is not None:
        problem, count = refused
        rejected["events"] += count
        raise problem
    return no_content()


def _ingest(db: Database, faults: Faults, content_type: str, body: bytes) -> tuple[ProblemError, int] | None:
    documents = split_body(content_type, body)
    poison = faults.poison()
    events, problem = read_events(documents, poison)
    with db.writing() as connection:
        store.store(connection, events)
    if problem is None:
        return None
    invalid_event = documents[len(events)]
    if isinstance(invalid_event, dict) and invalid_event.get("id") in poison:
        faults.event_refused(invalid_event["id"])
    return problem, len(documents) - len(events)


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
