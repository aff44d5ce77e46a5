"""Routes under /api/v1/meters."""

import re
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from syncd.sandbox.api.common import Db, Moment, answer, no_content, seconds
from syncd.sandbox.problems import invalid
from syncd.sandbox.store import meters as store
from syncd.sandbox.store import usage
from syncd.sandbox.store.meters import MeterBody

router = APIRouter(tags=["Meters"])

_GROUP_FILTER = re.compile(r"filterGroupBy\[(\w+)\]")


@router.get("/api/v1/meters")
def list_meters(db: Db) -> Response:
    """List all meters: an array, not paginated in OpenMeter either."""
    with db.reading() as connection:
        return answer(store.list_meters(connection))


@router.post("/api/v1/meters")
def create_meter(body: MeterBody, db: Db) -> Response:
    """Create a meter; 200, although OpenMeter's specification says 201."""
    with db.writing() as connection:
        return answer(store.create(connection, body))


@router.get("/api/v1/meters/{id_or_slug}")
def get_meter(id_or_slug: str, db: Db) -> Response:
    """Return a meter."""
    with db.reading() as connection:
        return answer(store.get(connection, id_or_slug))


@router.delete("/api/v1/meters/{id_or_slug}")
def delete_meter(id_or_slug: str, db: Db) -> Response:
    """Delete a meter but not its events; 204."""
    with db.writing() as connection:
        store.delete(connection, id_or_slug)
    return no_content()


@router.get("/api/v1/meters/{id_or_slug}/query")
def query_meter(
    request: Request,
    id_or_slug: str,
    db: Db,
    time_from: Annotated[Moment | None, Query(alias="from")] = None,
    time_to: Annotated[Moment | None, Query(alias="to")] = None,
    window_size: Annotated[
        Literal["MINUTE", "HOUR", "DAY", "MONTH"] | None, Query(alias="windowSize")
    ] = None,
    time_zone: Annotated[str, Query(alias="windowTimeZone")] = "UTC",
    subjects: Annotated[list[str], Query(alias="subject")] = [],  # noqa: B006 - FastAPI copies it
    customer_ids: Annotated[list[str], Query(alias="filterCustomerId", max_length=100)] = [],  # noqa: B006
    group_by: Annotated[list[str], Query(alias="groupBy")] = [],  # noqa: B006
    advanced_filters: Annotated[str | None, Query(alias="advancedMeterGroupByFilters")] = None,
    _client_id: Annotated[str | None, Query(alias="clientId", min_length=1, max_length=36)] = None,
) -> Response:
    """Query usage: {from, to, windowSize, data}. Filtering by subject or customer also groups by it."""
    if advanced_filters is not None:
        raise invalid("the sandbox does not support advancedMeterGroupByFilters; use filterGroupBy")
    _refuse_unknown_zone(time_zone)
    wanted = usage.Query(
        time_from=seconds(time_from),
        time_to=seconds(time_to),
        window_size=window_size,
        time_zone=time_zone,
        subjects=subjects,
        customer_ids=customer_ids,
        group_by=group_by,
        group_filters={
            match[1]: value
            for name, value in request.query_params.multi_items()
            if (match := _GROUP_FILTER.fullmatch(name))
        },
    )
    with db.reading() as connection:
        data = usage.query(connection, store.get(connection, id_or_slug), wanted)
    period = {"from": time_from, "to": time_to, "windowSize": window_size}
    return answer({name: value for name, value in period.items() if value is not None} | {"data": data})


def _refuse_unknown_zone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise invalid(f"invalid time zone: unknown time zone {name}") from None
