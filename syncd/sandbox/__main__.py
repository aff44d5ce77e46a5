"""`python -m syncd.sandbox`: same options as `syncd sandbox`, but without importing the rest of syncd."""

import argparse
from pathlib import Path

from syncd.sandbox import serve


def main() -> None:
    """Parse the command line and serve until a signal arrives."""
    parser = argparse.ArgumentParser(
        prog="python -m syncd.sandbox",
        description="A metering API on SQLite in OpenMeter's shapes. A development tool, not OpenMeter.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8888, help="0 picks a free port (default: %(default)s)")
    parser.add_argument("--db", type=Path, required=True, metavar="FILE", help="created if it does not exist")
    parser.add_argument("--token", help="require this bearer token")
    parser.add_argument(
        "--no-subjects",
        dest="subjects",
        action="store_false",
        help="emulate a server without /api/v1/subjects",
    )
    parser.add_argument(
        "--max-subjects-per-customer",
        type=int,
        metavar="N",
        help="answer 400 to customers with more than N subjects",
    )
    parser.add_argument(
        "--no-dedupe",
        dest="dedupe",
        action="store_false",
        help="emulate a server without deduplication: an event sent again in a later flush counts again",
    )
    parser.add_argument(
        "--flush-seconds",
        type=float,
        default=0,
        metavar="S",
        help="store events every S seconds, as a real server does (default: at once)",
    )
    options = parser.parse_args()
    serve(
        options.host,
        options.port,
        options.db,
        token=options.token,
        subjects=options.subjects,
        max_subjects_per_customer=options.max_subjects_per_customer,
        dedupe=options.dedupe,
        flush_seconds=options.flush_seconds,
    )


if __name__ == "__main__":
    main()
