"""All errors that syncd expects. Each message says what happened, to what, and what to do next.

::

    SyncdError                  exit status 1 (see `syncd.cli.main`)
     +-- ConfigError            a setting is missing or wrong; names the field and the file
     +-- SourceError            a source could not be read to its end; nothing was changed
     +-- ApiError               a request to an HTTP API failed
     |    +-- UnreachableError    no usable answer after all retries: network, TLS, 429, 5xx
     |    +-- UnauthorizedError   401 or 403: the token
     |    +-- MalformedError      an answer that the specification does not allow
     |    |    +-- UnreliableApiError  an answer about something else than was asked for
     |    +-- RefusedError        any other 4xx: the request, not the API, is at fault
     +-- StoppedError           syncd was asked to stop while a request was under way
     +-- MeterMissingError      `syncd usage` needs a meter that the server does not have
     +-- QueueFullError         too many different runs are waiting in the daemon
     +-- GatewayError           a request to a gateway's plugin failed; names the gateway
     +-- DaemonError            the daemon cannot start, or `resync` cannot reach it
     +-- UnsafePlanError        a guard stopped the run before its first change
     +-- PlanFileError          a plan file is unusable, or no longer matches the current state
     +-- ScopeError             `--source` and `--principal` match no principal
     +-- StateError             the state (history of runs, ...) cannot be read or written
     +-- LockedError            another syncd is writing
     +-- ApplyStoppedError      applying ended early; carries the outcomes so far
    BlockedError                one change is not allowed or not possible; recorded, the rest continues
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from syncd.core.changes import Outcome


class SyncdError(Exception):
    """Base of all expected errors; the user sees its text, without a traceback."""


class ConfigError(SyncdError):
    """The configuration is invalid."""


class SourceError(SyncdError):
    """A source could not be read completely; the run changes nothing."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"source {source}: {problem}")
        self.source = source


class ApiError(SyncdError):
    """A request to an HTTP API failed."""


class UnreachableError(ApiError):
    """No usable answer.

    `retryable` is whether another try can help: not if a name, a certificate or a setting is wrong. `status`
    is that of an answer (429, 5xx), None if there was none; `retry_after` is the wait in seconds that the API
    asked for, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.status = status
        self.retry_after = retry_after


class UnauthorizedError(ApiError):
    """The API answered 401 or 403."""


class MalformedError(ApiError):
    """The API gave an answer that its specification does not allow."""


class UnreliableApiError(MalformedError):
    """An answer is about another entity than was asked for, so no answer can be trusted: the run stops."""


class RefusedError(ApiError):
    """The API answered 4xx to one request: `status` is the code, `detail` the explanation of the server."""

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class StoppedError(SyncdError):
    """syncd was asked to stop while a request waited for its answer, its turn or its next try."""


class MeterMissingError(SyncdError):
    """A meter that `syncd usage` reads does not exist on the server."""


class GatewayError(SyncdError):
    """A request to a gateway's plugin failed or got an invalid answer; `gateway` is the gateway's name."""

    def __init__(self, gateway: str, problem: str) -> None:
        super().__init__(f"gateway {gateway}: {problem}")
        self.gateway = gateway


class DaemonError(SyncdError):
    """The daemon cannot start or cannot be reached."""


class UnsafePlanError(SyncdError):
    """A guard stopped the run before its first change; the message names numbers, limit and flag."""


class PlanFileError(SyncdError):
    """A plan file is unusable, or no longer matches the current state."""


class ScopeError(SyncdError):
    """`--source` and `--principal` match no principal."""


class StateError(SyncdError):
    """The state cannot be read or written; a run that cannot be recorded changes nothing."""


class QueueFullError(SyncdError):
    """Too many different runs are waiting."""


class LockedError(SyncdError):
    """Another syncd is writing; the message names its process."""


class ApplyStoppedError(SyncdError):
    """Applying a plan ended before its last change; `outcomes` are those of the changes so far."""

    def __init__(self, cause: str, outcomes: tuple[Outcome, ...]) -> None:
        super().__init__(cause)
        self.outcomes = outcomes


class BlockedError(Exception):
    """One change is not allowed or not possible; the message says why and what to do."""
