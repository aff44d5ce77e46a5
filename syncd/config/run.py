"""The sections of the configuration about runs: policy, guards, schedule, daemon."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self

from apscheduler.triggers.cron import CronTrigger
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from syncd.config.types import Duration, HttpUrl, Listen, Section

Percent = Annotated[int, Field(ge=0, le=100)]


class PolicyOptionsConfig(Section):
    """How long policy sync waits; both periods count from the mark that a run sets on what is gone."""

    detach_after: Duration = timedelta(days=40)
    """How long what is gone from the sources stays attached. Longer than an invoice takes."""
    delete_after: Duration | None = None
    """How long a customer that is gone is kept. Unset: no customer is ever deleted. Not shorter than
    `detach_after`."""

    @model_validator(mode="after")
    def _guard(self) -> Self:
        if self.delete_after is not None and self.delete_after < self.detach_after:
            raise ValueError("delete_after must not be shorter than detach_after")
        return self


class GuardsConfig(Section):
    """When a run stops before its first change (see `syncd.planning.guards`)."""

    max_update_percent: Percent = 30
    """Share of our customers that one run may change."""
    max_removal_percent: Percent = 30
    """Share of our subjects that one run may mark, detach, move or delete."""
    min_changes: Annotated[int, Field(ge=1)] = 10
    """Fewer changes than this never stop a run by their share."""
    max_changes: Annotated[int, Field(ge=1)] | None = None
    """Changes in one run, whatever their share. Unset: no limit."""
    max_clock_skew: Duration | None = timedelta(minutes=5)
    """Nothing is removed while our clock and the metering API's are further apart. `null`: not looked at."""


def _cron(value: str) -> str:
    try:
        CronTrigger.from_crontab(value)
    except ValueError as error:
        raise ValueError(f"must be five fields as in a crontab, such as '*/10 * * * *': {error}") from None
    return value


class ScheduleConfig(Section):
    """When the daemon syncs by itself, besides once at its start; `cron` (UTC) replaces the interval."""

    interval: Duration = timedelta(minutes=5)
    """Between two runs."""
    cron: Annotated[str, AfterValidator(_cron)] | None = None
    """Five fields, UTC, in the place of `interval`: `*/10 * * * *`."""
    jitter: Duration | None = None
    """Each run is late by a random time up to this."""


def _not_blank(token: SecretStr) -> SecretStr:
    # An environment variable that is set to nothing must not open the daemon to everybody.
    if not token.get_secret_value().strip():
        raise ValueError("must not be empty; leave it out where no token is wanted")
    return token


def default_state_dir() -> Path:
    """Return where the history is kept: as systemd says, else the system's place for root, or the user's."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/syncd")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "syncd"


class DaemonConfig(Section):
    """The daemon's HTTP API and dashboard (any address but loopback needs a token), and its history.

    `public_url` is where people reach the dashboard through a reverse proxy. With https its cookies are
    sent over https only; no header of a request is believed about that.
    """

    # NoDecode: from the environment it is this text, not JSON.
    listen: Annotated[Listen, NoDecode, BeforeValidator(Listen.parse)] = Listen("127.0.0.1", 8890)
    """Host and port of the HTTP API and the dashboard. Any address but loopback needs `token`."""
    token: Annotated[SecretStr, AfterValidator(_not_blank)] | None = None
    """Bearer token of the HTTP API, and what people log in to the dashboard with."""
    dashboard: bool = True
    """Whether the dashboard is served."""
    public_url: HttpUrl | None = None
    """Where people reach the dashboard through a reverse proxy; needs `token`. With https its cookies
    are sent over https only."""
    state_dir: Path = Field(default_factory=default_state_dir)
    """Run history and lock. Unset: `$STATE_DIRECTORY`; else `/var/lib/syncd` for root, `~/.local/state/syncd`
    for others."""
    keep_runs: Duration = timedelta(days=90)
    """How long runs stay in the history. The latest 100 stay in any case."""

    @model_validator(mode="after")
    def _guard(self) -> Self:
        if not self.listen.is_loopback and self.token is None:
            raise ValueError("listen is not a loopback address, so token must be set (SYNCD_DAEMON__TOKEN)")
        if self.public_url is not None and self.token is None:
            said = "public_url lets others than this machine in, so token must be set (SYNCD_DAEMON__TOKEN)"
            raise ValueError(said)
        return self
