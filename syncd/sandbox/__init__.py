"""An embedded metering API on SQLite that speaks OpenMeter v1 and v3: for development, demos and tests only.

It is not OpenMeter: it prices, invoices and replicates nothing. It serves the paths that the plugin and syncd
use, with the same shapes and the same errors, so that the same client works against the real server.
Behaviour taken from OpenMeter's source was read at commit 7e57a39 (2026-08-18).

Start with `api.app`. `api` holds the HTTP routes, `store` the SQLite database and its rules.
May import: nothing else of syncd, so that a bug in syncd cannot hide in its own test double.
"""

from pathlib import Path

__all__ = ["serve"]


def serve(
    host: str,
    port: int,
    db: Path,
    *,
    token: str | None = None,
    subjects: bool = True,
    max_subjects_per_customer: int | None = None,
    dedupe: bool = True,
    flush_seconds: float = 0,
) -> None:
    """Serve the sandbox until SIGTERM or SIGINT, then finish the requests in progress and return.

    `port` 0 picks a free port, which is printed on stderr. `db` is created, with the standard meters, if it
    does not exist. With a `token`, every request except /healthz needs `Authorization: Bearer <token>`.
    `subjects=False` answers 404 on /api/v1/subjects, as newer servers do. Events are stored, and visible,
    when their flush of `flush_seconds` ends; 0 means at once. A flush stores no event twice. `dedupe=False`
    is a server that knows no more than that: an event that is sent again later counts again.

    Raises OSError if the address cannot be bound, and sqlite3.Error if `db` is not a usable database.
    """
    from syncd.sandbox.server import run_until_signalled
    from syncd.sandbox.settings import Settings

    run_until_signalled(
        host,
        port,
        Settings(
            db=db,
            token=token,
            subjects=subjects,
            max_subjects_per_customer=max_subjects_per_customer,
            dedupe=dedupe,
            flush_seconds=flush_seconds,
        ),
    )
