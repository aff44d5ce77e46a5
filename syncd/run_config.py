"""The sections of the configuration about runs: policy, guards, schedule, daemon."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self

from apscheduler.triggers.cron import CronTrigger
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from syncd.config_types import Duration, Section
from syncd.listen import Listen

Percent = Annotated[int, Field(ge=0, le=100)]


class PolicyOptionsConfig(Section):
    """How long policy sync waits; both periods count from the mark that a run sets on what is gone."""

    detach_after: Duration = timedelta(days=40)
    delete_after: Duration | None = None

    @model_validator(mode="after")
    def _guard(self) -> Self:
        if self.delete_after is not None and self.delete_after < self.detach_after:
            raise ValueError("delete_after must not be shorter than detach_after")
        return self


class GuardsConfig(Section):
    """When a run stops before its first change (see `syncd.guards`)."""

    max_update_percent: Percent = 30
    max_removal_percent: Percent = 30
    min_changes: Annotated[int, Field(ge=1)] = 10
    max_changes: Annotated[int, Field(ge=1)] | None = None


def _cron(value: str) -> str:
    try:
        CronTrigger.from_crontab(value)
    except ValueError as error:
        raise ValueError(f"must be five fields as in a crontab, such as '*/10 * * * *': {error}") from None
    return value


class ScheduleConfig(Section):
    """When the daemon syncs by itself, besides once at its start; `cron` (UTC) replaces the interval."""

    interval: Duration = timedelta(minutes=5)
    cron: Annotated[str, AfterValidator(_cron)] | None = None
    jitter: Duration | None = None


def default_state_dir() -> Path:
    """Return where the history is kept: as systemd says, else the system's place for root, or the user's."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/syncd")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "syncd"


class DaemonConfig(Section):
    """The daemon's HTTP API (any address but loopback needs a token), and where it keeps its history."""

    # NoDecode: from the environment it is this text, not JSON.
    listen: Annotated[Listen, NoDecode, BeforeValidator(Listen.parse)] = Listen("127.0.0.1", 8890)
    token: SecretStr | None = None
    state_dir: Path = Field(default_factory=default_state_dir)
    keep_runs: Duration = timedelta(days=90)

    @model_validator(mode="after")
    def _guard(self) -> Self:
        if not self.listen.is_loopback and self.token is None:
            raise ValueError("listen is not a loopback address, so token must be set")
        return self
