"""`syncd meters`: compares and creates the standard meters and those of AI traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from syncd.cli.options import (
    APPLIED,
    BLOCKED,
    DRIFT,
    Command,
    ConfigOption,
    Group,
    Output,
    OutputOption,
    config_path,
    finish,
    print_json,
)

if TYPE_CHECKING:
    from syncd.metering.base import Meter, MeteringApi
    from syncd.metering.meters import MeterResult

app = typer.Typer(cls=Group, help="Manage the standard meters.", no_args_is_help=True)

AiOption = Annotated[
    bool,
    typer.Option(
        "--ai", help="Include the meters of AI calls, their cost, cache hits, MCP and A2A requests."
    ),
]
UnitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--unit", metavar="NAME", help="Include a meter for this unit of the plugin's setting units."
    ),
]


@app.command(cls=Command)
def plan(
    context: typer.Context,
    ai: AiOption = False,
    unit: UnitOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show which meters are missing or differ. Exit status: 0 none, 2 missing, 3 one differs, 1 error."""
    from syncd.metering.meters import plan_meters

    _run(context, plan_meters, ai, unit, config, output)


@app.command(cls=Command)
def apply(
    context: typer.Context,
    ai: AiOption = False,
    unit: UnitOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Create missing standard meters. Exit status: 0 all exist, 3 one differs, 1 error.

    A meter that differs is reported but never changed.
    """
    from syncd.metering.meters import apply_meters

    _run(context, apply_meters, ai, unit, config, output)


def _run(
    context: typer.Context,
    work: Callable[[MeteringApi, Sequence[Meter]], tuple[MeterResult, ...]],
    ai: bool,
    units: list[str] | None,
    config: ConfigOption,
    output: Output,
) -> None:
    from syncd.cli.options import printable
    from syncd.config import settings
    from syncd.metering.meters import AI_METERS, STANDARD_METERS, unit_meter
    from syncd.runs.factory import target_of

    wanted = [*STANDARD_METERS, *(AI_METERS if ai else ()), *map(unit_meter, units or ())]
    loaded = settings.load(config_path(context, config))
    with closing(target_of(loaded)) as target:
        results = work(target, wanted)
    if output is Output.JSON:
        print_json({"meters": [result.to_json() for result in results]})
    else:
        for result in results:
            detail = f": {'; '.join(result.differences)}. Not changed" if result.differences else ""
            print(printable(f"{result.key}: {result.status}{detail}"))
    statuses = {result.status for result in results}
    finish(BLOCKED if "differs" in statuses else DRIFT if "missing" in statuses else APPLIED)
