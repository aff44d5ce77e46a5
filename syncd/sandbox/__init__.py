"""An embedded metering API on SQLite that speaks OpenMeter v1 and v3: for development, demos and tests only.

It is not OpenMeter: nothing is priced, invoiced or replicated. It answers the paths that the plugin and syncd
use, in the same shapes and with the same refusals, so that the same client works on the real server. Where a
behaviour comes from OpenMeter's source it was read at commit 7e57a39 (2026-08-18).
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
) -> None:
    """Serve the sandbox until SIGTERM or SIGINT, then finish the requests in hand and return.

    `port` 0 takes a free one; the line on stderr tells which. `db` is created, with the standard meters, when
    it does not exist. With a `token` every request but /healthz needs `Authorization: Bearer <token>`.
    `subjects=False` answers 404 on /api/v1/subjects, as newer servers do.

    Raises OSError when the address cannot be bound and sqlite3.Error when `db` is not a usable database.
    """
    from syncd.sandbox.server import run_until_signalled
    from syncd.sandbox.settings import Settings

    run_until_signalled(
        host,
        port,
        Settings(db=db, token=token, subjects=subjects, max_subjects_per_customer=max_subjects_per_customer),
    )
