"""The smaller sections: policy options, guards, schedule, daemon, ignore, notify, usage, gateways."""

from __future__ import annotations

import os
import re
from datetime import UTC, date, datetime, timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from cronsim import CronSim, CronSimError
from cronsim.cronsim import Field as CronField
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic_settings import NoDecode

from syncd.config.types import ConnectionConfig, Duration, HttpUrl, Key, Listen, Section, Token
from syncd.core.errors import ConfigError
from syncd.state.location import StateLocation, check_url

Percent = Annotated[int, Field(ge=0, le=100)]


class PolicyOptionsConfig(Section):
    """Grace periods of policy sync; both start when a run records that something is orphaned."""

    detach_after: Duration = timedelta(days=40)
    """How long an orphaned subject stays attached. Longer than invoicing takes."""
    delete_after: Duration | None = None
    """How long an orphaned customer stays. At least `detach_after`. Unset: no customer is ever deleted."""

    @model_validator(mode="after")
    def _check_periods(self) -> Self:
        if self.delete_after is not None and self.delete_after < self.detach_after:
            raise ValueError("delete_after must not be shorter than detach_after")
        return self


class GuardsConfig(Section):
    """Limits that stop a run before its first change (see `syncd.planning.guards`)."""

    max_update_percent: Percent = 30
    """Percentage of the managed customers that one run may change."""
    max_removal_percent: Percent = 30
    """Percentage of the managed subjects that one run may mark as orphaned, detach, move or delete."""
    min_changes: Annotated[int, Field(ge=1)] = 10
    """The percentages do not apply to runs with fewer changes than this."""
    max_changes: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of changes in one run. Unset: no limit."""
    max_clock_skew: Duration | None = timedelta(minutes=5)
    """Nothing is removed while syncd's clock and the metering API's differ by more. `null`: no check."""


_NAMED = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
"""As in crontab(5)."""
_FIELDS = 5
_LONGEST_MONTH = 31


def next_times(expression: str, after: datetime, count: int) -> list[datetime]:
    """Return the next times of a crontab expression, with the meaning that cron gives it (cronsim: Debian's).

    Raises ValueError, also if the expression has no time at all (30 February).
    """
    fields = _NAMED.get(expression.strip().lower(), expression).split()
    if len(fields) != _FIELDS:
        raise ValueError("must be five crontab fields, such as '*/10 * * * *', or a name such as @daily")
    try:
        found = list(islice(CronSim(" ".join(fields), after), count))
    except CronSimError as error:
        fault = str(error)
        if fault == CronField.DAY.msg() and fields[2].isdigit() and 1 <= int(fields[2]) <= _LONGEST_MONTH:
            fault = f"none of its months has a day {fields[2]}"
        raise ValueError(f"is not valid in a crontab: {fault[:1].lower()}{fault[1:]}") from None
    if not found:
        raise ValueError("names no date that ever comes")
    return found


def crontab(value: str) -> str:
    """Check a crontab expression; raises ValueError."""
    next_times(value, datetime.now(UTC), 1)
    return value


class ScheduleConfig(Section):
    """When the daemon starts runs by itself, in addition to the one at its start."""

    interval: Duration = timedelta(minutes=5)
    """Time between two runs."""
    cron: Annotated[str, AfterValidator(crontab)] | None = None
    """Five crontab fields in UTC, instead of `interval`: `*/10 * * * *`. As in cron, Sunday is 0 and 7, a day
    fits by day of month or by weekday if both are restricted, and there are names and `@daily`."""
    jitter: Duration | None = None
    """Maximum random delay of each run."""

    def upcoming(self, now: datetime) -> list[datetime]:
        """Return the next three times of `cron`, none without it: people misread crontab fields."""
        return next_times(self.cron, now, 3) if self.cron else []


_SHORTEST_TOKEN = 16
"""As the plugin's API asks for: shorter ones can be guessed."""


def _hard_to_guess(token: SecretStr) -> SecretStr:
    # An empty environment variable must not open the daemon to everyone.
    if not token.get_secret_value():
        raise ValueError("must not be empty; leave it out if no token is wanted")
    if len(token.get_secret_value()) < _SHORTEST_TOKEN:
        raise ValueError(
            f"must have at least {_SHORTEST_TOKEN} characters, so that it cannot be guessed;"
            " `openssl rand -hex 24` makes one"
        )
    return token


def default_state_dir() -> Path:
    """Return the default folder: systemd's `$STATE_DIRECTORY`, else that of the system or the user."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/syncd")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "syncd"


def _day(value: object) -> object:
    if isinstance(value, date) or value is None:
        return value
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        raise ValueError("must be a day, such as 2026-12-31") from None


class IgnoredSubjectConfig(Section):
    """A subject whose unbilled usage is meant to be so."""

    subject: Key
    """The subject, such as `healthcheck`."""
    reason: str = Field(min_length=1, max_length=256)
    """Why its usage is not billed."""
    by: str | None = Field(None, min_length=1, max_length=256)
    """Who decided that."""
    until: Annotated[
        date | None, BeforeValidator(_day), WithJsonSchema({"type": ["string", "null"], "format": "date"})
    ] = None
    """The last day of it, in UTC. Unset: no end."""

    @property
    def words(self) -> str:
        """Return the decision in words."""
        by = f", by {self.by}" if self.by else ""
        return f"{self.reason}{by}{f', until {self.until}' if self.until else ''}"


def _database_url(url: SecretStr) -> SecretStr:
    return SecretStr(check_url(url.get_secret_value()))


class DaemonConfig(Section):
    """The daemon's HTTP API, dashboard and state.

    Whether cookies are sent over https only depends on `public_url` alone, never on a header of a request.
    """

    # NoDecode: an environment variable holds plain text, not JSON.
    listen: Annotated[
        Listen,
        NoDecode,
        BeforeValidator(Listen.parse),
        WithJsonSchema({"type": "string", "examples": ["127.0.0.1:8890"]}),
    ] = Listen("127.0.0.1", 8890)
    """Host and port of the HTTP API and the dashboard. Any address other than loopback requires `token`."""
    token: Annotated[Token, AfterValidator(_hard_to_guess)] | None = None
    """Bearer token of the HTTP API, and the login for the dashboard. At least 16 characters."""
    dashboard: bool = True
    """Whether the dashboard is served."""
    public_url: HttpUrl | None = None
    """URL of the dashboard behind a reverse proxy; requires `token`. With https, cookies are sent over https
    only."""
    state_dir: Path = Field(default_factory=default_state_dir)
    """Folder of the state, such as the run history, and of the lock. Unset: `$STATE_DIRECTORY`, else
    `/var/lib/syncd` for root and `~/.local/state/syncd` for other users."""
    state_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = None
    """PostgreSQL database (14 or newer) for the state instead of a file in `state_dir`, so that several syncd
    can share it: `postgresql://syncd:password@db.example.com/syncd?sslmode=verify-full`. Needs the extra
    `postgres`. May contain parameters of libpq; without a password, libpq looks for one as psql does."""
    keep_runs: Duration = timedelta(days=90)
    """How long runs stay in the history. The latest 100 always stay."""

    @property
    def state(self) -> StateLocation:
        """Return where the state is."""
        return StateLocation(self.state_dir, self.state_url.get_secret_value() if self.state_url else None)

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if not self.listen.is_loopback and self.token is None:
            raise ValueError("listen is not a loopback address, so token must be set (SYNCD_DAEMON__TOKEN)")
        if self.public_url is not None and self.token is None:
            raise ValueError("public_url opens the daemon, so token must be set (SYNCD_DAEMON__TOKEN)")
        return self


Topic = Literal["failed-runs", "blocked", "unbilled", "dead-letters", "gateways"]
_SCHEMA = re.compile(r"([a-z][a-z0-9+.-]*)://\S+", re.IGNORECASE)


def _notification_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not _SCHEMA.fullmatch(text):
        raise ValueError("must be an Apprise URL, such as slack://... or mailto://...")
    return SecretStr(text)


NotificationUrl = Annotated[SecretStr, AfterValidator(_notification_url)]


class NotifyConfig(Section):
    """Messages to people, sent by `syncd run` through Apprise."""

    urls: tuple[NotificationUrl, ...] = ()
    """Where to send to, as [Apprise URLs](https://github.com/caronc/apprise/wiki): Slack, Teams, mail,
    webhooks. They hold secrets: take them from the environment with `${VAR}`. Needs the extra `[notify]`."""
    topics: tuple[Topic, ...] = ("failed-runs", "blocked", "unbilled", "dead-letters", "gateways")
    """What to send. Each thing is sent once, and again after it had ended."""
    unbilled_events: Annotated[int, Field(ge=1)] = 1
    """Unbilled events from which a message is sent; another one each time that they have doubled."""
    gateway_lag: Duration = timedelta(minutes=15)
    """For how long events must have waited on a gateway, or a gateway must not have answered."""
    summary: Annotated[str, AfterValidator(crontab)] | None = "0 8 * * 1"
    """When to send a summary of the last seven days, as five crontab fields in UTC. `null`: never."""
    timeout: Duration = timedelta(seconds=30)
    """Time for sending one message to all `urls`; after that it is tried again later."""

    def check(self) -> None:
        """Raise ConfigError if there are URLs and Apprise is not installed."""
        if self.urls and find_spec("apprise") is None:
            raise ConfigError(
                "notify.urls needs Apprise, which is not installed: pip install 'kong-openmeter[notify]'"
            )


def schema_of(url: str) -> str:
    """Return the kind of an Apprise URL, the only part of it that may be shown: slack, mailto."""
    found = _SCHEMA.fullmatch(url)
    return found[1].lower() if found else "?"


_SHORTEST = timedelta(minutes=1)
_LONGEST_KEPT = timedelta(days=800)
_MAX_DIMENSIONS = 6
"""Each further one multiplies the rows that are kept."""


def _not_too_often(value: timedelta) -> timedelta:
    if value < _SHORTEST:
        raise ValueError("must be at least 1m: each refresh asks the metering API for every meter")
    return value


def _days(value: timedelta) -> timedelta:
    if not timedelta(days=2) <= value <= _LONGEST_KEPT:
        raise ValueError(f"must be from 2d to {_LONGEST_KEPT.days}d")
    return value


def _dimensions(value: object) -> object:
    if not isinstance(value, dict):
        return value
    for meter, names in value.items():
        if names is None:
            continue
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{meter} must have a list of dimensions, such as [model, type]; [] is none")
        if len(set(names)) > _MAX_DIMENSIONS:
            raise ValueError(f"{meter} has more than {_MAX_DIMENSIONS} dimensions")
    return {meter: tuple(names or ()) for meter, names in value.items()}


Dimensions = Annotated[dict[Key, tuple[str, ...]], BeforeValidator(_dimensions)]


class UsageConfig(Section):
    """The usage that the daemon keeps, so that pages never wait for the metering API."""

    interval: Annotated[Duration, AfterValidator(_not_too_often)] = timedelta(minutes=30)
    """Time between two refreshes. One takes a request for the meters, one for each meter, and one for each
    day of a meter that has changed since: three requests for two meters, and five as a rule."""
    keep: Annotated[Duration, AfterValidator(_days)] = timedelta(days=400)
    """How far back usage is fetched and kept."""
    meters: Dimensions = Field(
        default={"kong_api_requests": ("route_name",), "kong_llm_tokens": ("model", "type")}
    )
    """The meters, which count or sum, each with the dimensions by which its usage is shown. Meters and
    dimensions of `prices` need not be repeated here. `{}` without prices keeps nothing."""


_UNIX = "unix:"
_HTTP_URL: TypeAdapter[str] = TypeAdapter(HttpUrl)


def _gateway_url(value: str) -> str:
    if not value.startswith(_UNIX):
        return _HTTP_URL.validate_python(value)
    if not PurePosixPath(value.removeprefix(_UNIX)).is_absolute():
        raise ValueError("a Unix socket needs an absolute path, such as unix:/run/openmeter/api")
    return value


def _not_empty(value: SecretStr) -> SecretStr:
    if not value.get_secret_value():
        raise ValueError("must not be empty")
    return value


def _host_and_port(value: str) -> str:
    parts = urlsplit(f"//{value}")
    try:
        valid = parts.hostname is not None and parts.port != 0 and not (parts.path or parts.username)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("must be a host, or host:port, such as openmeter:8888")
    return value.lower()


GatewayUrl = Annotated[str, AfterValidator(_gateway_url)]
Host = Annotated[str, AfterValidator(_host_and_port)]


class GatewayConfig(ConnectionConfig):
    """A gateway: address and token of its plugin's API (`openmeter-plugin serve --api`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Unique name for messages."""
    url: GatewayUrl
    """URL of the plugin's API (`serve --api`): `http(s)://host:port`, or `unix:/path` on this machine."""
    token: Annotated[Token, AfterValidator(_not_empty)] | None = None
    """The token in `--api-token-file` or `OPENMETER_PLUGIN_ADMIN_TOKEN` on the gateway."""
    timeout: Duration = timedelta(seconds=10)
    """Limit for each step of a request: connect, send, each read. The whole request may take three times as
    long."""
    metering_hosts: tuple[Host, ...] = ()
    """Other hosts (host, or host:port) through which this gateway's events reach `metering.url`."""


def check_unique(gateways: tuple[GatewayConfig, ...]) -> tuple[GatewayConfig, ...]:
    """Return the gateways; raises ValueError if two have the same name or the same URL."""
    names = [gateway.name for gateway in gateways]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two gateways are called {', '.join(duplicates)}; give each its own name")
    urls = [gateway.url for gateway in gateways]
    if duplicates := sorted({url for url in urls if urls.count(url) > 1}):
        raise ValueError(f"{', '.join(duplicates)} is listed twice, so its events would be counted twice")
    return gateways
