"""Every error that syncd expects; the messages tell a person what happened, to what, and what to do next.

::

    SyncdError                  exit status 1 (see `syncd.cli.main`)
     +-- ConfigError            a setting is missing or wrong; names the field and the file
     +-- SourceError            a source could not be read to its end; nothing was changed
     +-- ApiError               an HTTP API did not do what was asked
     |    +-- UnreachableError    no usable answer after all retries: network, 429, 5xx
     |    +-- UnauthorizedError   401 or 403: the token
     |    +-- MalformedError      an answer that is not what the specification says
     |    +-- RefusedError        any other 4xx: this request, not the API, is the problem
     +-- MeterMissingError           `syncd usage` needs a meter that the server does not have
     +-- QueueFullError         the daemon has too many different runs waiting
     +-- GatewayError           a gateway's plugin could not be asked; names the gateway
     +-- DaemonError            the daemon cannot start, or cannot be reached by `resync`
     +-- UnsafePlanError        a guard stopped the run before its first change
     +-- PlanFileError          a plan file cannot be used, or the world is another by now
     +-- ScopeError             `--source` and `--principal` fit nobody
     +-- HistoryError           the history in daemon.state_dir cannot be used
     +-- LockedError            another syncd is writing
     +-- ApplyStoppedError           applying ended early; carries what was done until then
    BlockedError                     one change must not or cannot be made; recorded, the rest goes on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from syncd.core.changes import Outcome


class SyncdError(Exception):
    """Base of all expected errors; its text is shown to the user as it is, without a traceback."""


class ConfigError(SyncdError):
    """The configuration cannot be used."""


class SourceError(SyncdError):
    """A source could not be read completely; a run that meets one changes nothing."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"source {source}: {problem}")
        self.source = source


class ApiError(SyncdError):
    """An HTTP API did not do what was asked."""


class UnreachableError(ApiError):
    """No usable answer; `retry_after` is the wait in seconds that the API asked for, if any."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnauthorizedError(ApiError):
    """The API answered 401 or 403."""


class MalformedError(ApiError):
    """The API answered something that its specification does not allow."""


class RefusedError(ApiError):
    """The API answered 4xx to one request: `status` is the code, `detail` what the server said about it."""

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class MeterMissingError(SyncdError):
    """A meter that `syncd usage` reads does not exist on the server."""


class GatewayError(SyncdError):
    """The plugin of a gateway could not be asked, or answered what it must not; `gateway` is its name."""

    def __init__(self, gateway: str, problem: str) -> None:
        super().__init__(f"gateway {gateway}: {problem}")
        self.gateway = gateway


class DaemonError(SyncdError):
    """The daemon cannot start or cannot be reached."""


class UnsafePlanError(SyncdError):
    """A guard stopped the run before its first change; the message has numbers, limit and flag."""


class PlanFileError(SyncdError):
    """A plan file cannot be used."""


class ScopeError(SyncdError):
    """The selection of principals fits nobody."""


class HistoryError(SyncdError):
    """The run history cannot be read or written; a run that cannot be recorded changes nothing."""


class QueueFullError(SyncdError):
    """Too many different runs wait already."""


class LockedError(SyncdError):
    """Another syncd is writing; the message says which."""


class ApplyStoppedError(SyncdError):
    """Applying a plan ended before its last change; `outcomes` tells what was done until then."""

    def __init__(self, cause: str, outcomes: tuple[Outcome, ...]) -> None:
        super().__init__(cause)
        self.outcomes = outcomes


class BlockedError(Exception):
    """One change must not or cannot be made; the message says why and what to do."""
