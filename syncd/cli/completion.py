"""Shell completion of values that depend on the configuration: names of sources, ids of runs.

It runs at each press of the tab key: whatever fails ends in no suggestions, never in an error on the line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from syncd.cli.options import DEFAULT_CONFIG
from syncd.core.errors import SyncdError

if TYPE_CHECKING:
    from syncd.config.settings import Config

_MAX_RUNS = 50


def sources(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the sources that begin so."""
    from syncd.config.sources import source_names

    config = _config(context)
    names = source_names(config.sources) if config else []
    return [name for name in names if name.startswith(incomplete)]


def runs(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the ids of the latest runs that begin so, each with when it was and how it ended."""
    config = _config(context)
    if config is None or not config.daemon.state.exists():
        return []
    from syncd.runs.history import History
    from syncd.state.database import State

    try:
        with State(config.daemon.state) as state:
            found = History(state).runs(_MAX_RUNS)
    except SyncdError:
        return []
    return [
        (str(run["id"])[:8], f"{str(run['requested_at'])[:16]} {run['state']}")
        for run in found
        if str(run["id"]).startswith(incomplete)
    ]


def _config(context: typer.Context) -> Config | None:
    """Return the configuration of the command line so far, None if it cannot be read."""
    from syncd.config import settings

    # Completion runs no callbacks, so the option before the command is in the parameters of its context.
    contexts = [context, context.parent] if context.parent else [context]
    given = next((path for one in contexts if (path := one.params.get("config"))), None)
    try:
        return settings.load(Path(given or os.environ.get("SYNCD_CONFIG") or DEFAULT_CONFIG))
    except SyncdError:
        return None
