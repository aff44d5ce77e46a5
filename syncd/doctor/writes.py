"""Check of write permissions, by requests that a server authorizes but then rejects for their content.

A server checks the token before the body: 401 and 403 mean that the permission is missing, any other 4xx
that it is granted. So each request is one that changes nothing either way:

======  ====================================  =====================================================
POST    customers, body ``{}``                a customer needs a name: 400
PUT     customers/<an unused id>,             400, or 404
        body ``{}``
DELETE  the same id                           404, or 204 if deleting an unused id is no error (v3);
                                              only if the configuration deletes at all
POST    subjects, body ``[]``                 no subject: 200, or 400 (v1, on servers that have them)
======  ====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from syncd.config.settings import Config
from syncd.core.errors import ApiError, RefusedError, UnauthorizedError
from syncd.doctor.checks import Finding, Level
from syncd.http.client import ApiClient

_UNKNOWN_ID = "00000000000000000000000000"
"""A ULID of the first millisecond of 1970, which no server has ever created."""

_NO_SUCH_PATH = frozenset({404, 405, 410})


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One request.

    `harmless`: a 2xx changes nothing. `absent`: statuses of a path that does not exist. `optional`: a server
    may lack the path.
    """

    what: str
    method: str
    path: str
    body: object = None
    harmless: bool = True
    absent: frozenset[int] = frozenset({405})
    optional: bool = False


def check_writes(client: ApiClient, config: Config) -> Iterator[Finding]:
    """Check that the token may write what syncd writes; `client` should not retry failures."""
    allowed: list[str] = []
    for attempt in _attempts(config):
        problem = _problem(client, attempt)
        if problem is None:
            allowed.append(attempt.what)
        elif problem.text:
            yield problem
    if allowed:
        yield Finding("rights", Level.OK, f"the token may {', '.join(allowed)}")


def _attempts(config: Config) -> Iterator[_Attempt]:
    v1 = config.metering.dialect == "openmeter-v1"
    customers = "/api/v1/customers" if v1 else "/openmeter/customers"
    yield _Attempt("create customers", "POST", customers, {}, harmless=False, absent=_NO_SUCH_PATH)
    yield _Attempt("change customers", "PUT", f"{customers}/{_UNKNOWN_ID}", {}, harmless=False)
    if config.policy == "sync" and config.policy_options.delete_after is not None:
        yield _Attempt("delete customers", "DELETE", f"{customers}/{_UNKNOWN_ID}")
    if v1:
        path = "/api/v1/subjects"
        yield _Attempt("write subjects", "POST", path, [], absent=_NO_SUCH_PATH, optional=True)


def _problem(client: ApiClient, attempt: _Attempt) -> Finding | None:
    """Return a problem, None if the permission is granted; without text if an optional path is missing."""
    try:
        client.request(attempt.method, attempt.path, body=attempt.body, repeat=False)
    except UnauthorizedError as error:
        return Finding("rights", Level.PROBLEM, f"the token may not {attempt.what}: {error}")
    except RefusedError as error:
        if error.status not in attempt.absent:
            return None
        if attempt.optional:
            return Finding("rights", Level.OK, "")
        text = f"the server has no path to {attempt.what}. Check metering.dialect ({error})"
        return Finding("rights", Level.PROBLEM, text)
    except ApiError as error:
        text = f"cannot check whether the token may {attempt.what}: {error}"
        return Finding("rights", Level.WARNING, text)
    if attempt.harmless:
        return None
    text = (
        f"the server accepted a customer without a name ({attempt.method} {attempt.path}). Check metering.url"
    )
    return Finding("rights", Level.PROBLEM, text)
