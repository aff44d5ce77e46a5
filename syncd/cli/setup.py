"""Commands that set up: `init` and `check` of the configuration file, and `meters`.

`init` writes a configuration, `check` validates one without the network, `meters` compares and creates the
standard meters and those of AI traffic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
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
    console,
    finish,
    print_json,
)
from syncd.core.errors import ConfigError

if TYPE_CHECKING:
    from syncd.metering.base import Meter, MeteringApi
    from syncd.metering.meters import MeterResult

_FILE = """\
# Configuration of syncd, written by `syncd init`. Check it with `syncd check`, then run `syncd plan`.
#
# Keep tokens out of this file: SYNCD_METERING__TOKEN is that of the metering API, SYNCD_SOURCES__0__TOKEN
# that of the first source. Any setting can be a variable: SYNCD_<SECTION>__<SETTING>. In this file, ${{NAME}}
# is the value of the variable NAME, and ${{NAME:-default}} has a default.

# Written into the metadata of each customer that syncd creates; it never changes customers of others. Give
# each syncd that shares the metering API another one, and do not change it later.
owner_id: default

# Where consumers are read. All that bill to this metering API belong here.
sources:
{source}
metering:
  # openmeter-v1: a self-hosted OpenMeter. openmeter-v3: Konnect, and newer servers.
  dialect: {dialect}
  url: {metering}

mapping:
  # Which consumers share a customer: tag (those with the same tag customer:<key>), custom_id, file, or none.
  group_by: {group_by}

# create-only: never changes an existing customer. upsert-only: adds and renames. sync: also detaches what no
# source names any more, after a grace period.
policy: upsert-only

# When `syncd run` syncs, in addition to its start.
schedule:
  interval: 5m

# daemon:
#   listen: 127.0.0.1:8890        # API and dashboard
#   state_dir: state              # run history; default: /var/lib/syncd as root, else ~/.local/state/syncd
"""
_KONG = """\
  - type: kong-admin              # Kong's Admin API
    url: {url}
    # workspace: default          # Enterprise only
"""
_DECLARATIVE = """\
  - type: declarative-file        # the kong.yml of a DB-less Kong
    path: {path}
"""
_GROUPS = ("none", "tag", "custom_id")


def init(
    context: typer.Context,
    config: ConfigOption = None,
    kong: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Kong's Admin API, or the path of its declarative file."),
    ] = None,
    metering: Annotated[str | None, typer.Option(metavar="URL", help="The metering API.")] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Who shares a customer: {', '.join(_GROUPS)}.")
    ] = None,
    doctor: Annotated[bool, typer.Option(help="Run the checks of `syncd doctor` afterwards.")] = True,
) -> None:
    """Write a commented configuration, and check what it names. Asks for what no option gives.

    Never overwrites a file. Exit status: 1 if the checks find a problem, else 0.
    """
    from syncd.cli.daemon import show_checkup
    from syncd.config import settings

    path = config_path(context, config)
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another file with --config")
    kong = _given(
        kong, "--kong", "Kong's Admin API, or the path of a declarative file", "http://127.0.0.1:8001"
    )
    metering = _given(metering, "--metering", "URL of the metering API", "http://127.0.0.1:8888")
    group_by = _given(group_by, "--group-by", f"Who shares a customer ({', '.join(_GROUPS)})", "tag")
    if group_by not in _GROUPS:
        raise typer.BadParameter(f"must be one of {', '.join(_GROUPS)}", param_hint="--group-by")
    text = _written(kong, metering, group_by)
    try:
        path.write_text(text)
        loaded = settings.load(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    except ConfigError:
        path.unlink()
        raise
    print(f"Wrote {path}.")
    if doctor:
        finish(show_checkup(loaded, Output.TEXT, probe=None))


def _given(value: str | None, flag: str, question: str, default: str) -> str:
    """Return the value of an option, or the answer of a person at the terminal."""
    if value is not None:
        return value
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("is needed where there is no terminal to ask on", param_hint=flag)
    answer: str = typer.prompt(question, default=default)
    return answer


def _written(kong: str, metering: str, group_by: str) -> str:
    is_url = "://" in kong
    source = _KONG.format(url=json.dumps(kong)) if is_url else _DECLARATIVE.format(path=json.dumps(kong))
    dialect = "openmeter-v3" if ".konghq.com" in metering else "openmeter-v1"
    return _FILE.format(source=source, dialect=dialect, metering=json.dumps(metering), group_by=group_by)


def check(context: typer.Context, config: ConfigOption = None, output: OutputOption = Output.TEXT) -> None:
    """Validate the configuration and the files that it names, without the network.

    Exit status: 0 valid, 1 invalid.
    """
    from openmeter_plugin.units import plural
    from syncd.cli.render import line
    from syncd.config import settings
    from syncd.runs.factory import examine_files

    path: Path = config_path(context, config)
    found = examine_files(settings.load(path))
    if output is Output.JSON:
        print_json({"valid": True, "principals": found.principals, "notes": list(found.notes)})
        return
    for note in found.notes:
        line(console(), f"Note: {note}.")
    line(console(), f"{path} is valid: {plural(found.principals, 'principal')} in local sources.")


COMMANDS = (init, check)


meters_app = typer.Typer(cls=Group, help="Manage the standard meters.", no_args_is_help=True)

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


@meters_app.command("plan", cls=Command)
def meters_plan(
    context: typer.Context,
    ai: AiOption = False,
    unit: UnitOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show which meters are missing or differ. Exit status: 0 none, 2 missing, 3 one differs, 1 error."""
    from syncd.metering.meters import plan_meters

    _of_meters(context, plan_meters, ai, unit, config, output)


@meters_app.command("apply", cls=Command)
def meters_apply(
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

    _of_meters(context, apply_meters, ai, unit, config, output)


def _of_meters(
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
