"""Check of write permissions, by requests that a server authorizes but then rejects for their content.

The requests are those of the metering API's client (`try_write`); each changes nothing either way.
"""

from __future__ import annotations

from collections.abc import Iterator

from syncd.config.settings import Config
from syncd.core.errors import ApiError, UnauthorizedError
from syncd.doctor.checks import Finding, Level
from syncd.metering.base import MeteringApi, Write


def check_writes(api: MeteringApi, config: Config) -> Iterator[Finding]:
    """Check that the token may write what syncd writes."""
    allowed: list[str] = []
    for write in _needed(config):
        found = _check(api, write)
        if found is None:
            allowed.append(write)
        elif found.text:
            yield found
    if allowed:
        yield Finding("rights", Level.OK, f"the token may {', '.join(allowed)}")


def _needed(config: Config) -> Iterator[Write]:
    yield "create customers"
    yield "change customers"
    if config.policy == "sync" and config.policy_options.delete_after is not None:
        yield "delete customers"
    yield "write subjects"


def _check(api: MeteringApi, write: Write) -> Finding | None:
    """Return a problem, None if the permission is granted; without text if it is not needed here."""
    try:
        trial = api.try_write(write)
    except UnauthorizedError as error:
        return Finding("rights", Level.PROBLEM, f"the token may not {write}: {error}")
    except ApiError as error:
        text = f"cannot check whether the token may {write}: {error}"
        return Finding("rights", Level.WARNING, text)
    if trial.outcome == "allowed":
        return None
    if trial.outcome == "accepted":
        text = f"the server accepted a customer without a name ({trial.said}). Check metering.url"
        return Finding("rights", Level.PROBLEM, text)
    if write == "write subjects":  # not every server has subject entities
        return Finding("rights", Level.OK, "")
    text = f"the server has no path to {write}. Check metering.dialect ({trial.said})"
    return Finding("rights", Level.PROBLEM, text)
