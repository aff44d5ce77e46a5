"""`make leaders`: three syncd on one PostgreSQL, whose leader is killed or frozen in each round."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from syncd.sandbox.testing import running_sandbox
from tests.harness.postgres import programs, running_postgres
from tests.leaders.cluster import PromiseBroken, Report, running_cluster


def main() -> int:
    """Run the rounds; the exit status is 1 if a promise was broken, 2 without PostgreSQL."""
    options = argparse.ArgumentParser(prog="make leaders")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--seed", type=int, default=1)
    arguments = options.parse_args()
    installed = programs()
    if installed is None:
        print("PostgreSQL is not installed (on Debian: apt-get install postgresql)", file=sys.stderr)
        return 2
    reports: list[Report] = []
    with (
        tempfile.TemporaryDirectory(prefix="syncd-leaders-") as folder,
        running_sandbox() as metering,
        running_postgres(installed) as postgres,
        running_cluster(Path(folder), metering, postgres.new_database(), arguments.seed) as cluster,
    ):
        for number in range(1, arguments.rounds + 1):
            try:
                report = cluster.round()
            except PromiseBroken as error:
                print(f"round {number} of seed {arguments.seed}: {error}", flush=True)
                for node in cluster.nodes:
                    print(f"--- syncd {node.number}\n{(node.folder / 'log').read_text()[-4000:]}")
                return 1
            reports.append(report)
            print(
                f"round {number}: {report.kind} after {report.writes_before} writes, another led after"
                f" {report.takeover:.1f} s{', a run was cut off' if report.cut_off else ''}",
                flush=True,
            )
        writes = len(cluster.writes)
    print(summary(reports, writes))
    return 0


def summary(reports: list[Report], writes: int) -> str:
    """Return what all rounds came to."""
    takeovers = {
        kind: [report.takeover for report in reports if report.kind == kind]
        for kind in ("SIGKILL", "SIGSTOP")
    }
    parts = [
        f"{len(times)} x {kind}: another led after {statistics.median(times):.1f} s (median), at most"
        f" {max(times):.1f} s"
        for kind, times in takeovers.items()
        if times
    ]
    cut = sum(report.cut_off for report in reports)
    return (
        f"{len(reports)} rounds held, {writes:,} writes, one writer at a time, no unmanaged customer touched;"
        f" {cut} with a run that was cut off. " + "; ".join(parts)
    )


if __name__ == "__main__":
    sys.exit(main())
