"""`make soak`: many rounds of load, kill -9 and failing metering APIs; a seed for each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import cycle
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.soak.round import Report, RoundFailed, Trouble, run_round

console = Console()


def main() -> int:
    """Run the rounds; the exit status is 1 if a promise was broken in any."""
    options = argparse.ArgumentParser(prog="make soak")
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--seed", type=int, default=1, help="of the first round; the others count on")
    options.add_argument("--requests", type=int, default=4_000, help="in each round")
    arguments = options.parse_args()
    reports: list[Report] = []
    failures: list[str] = []
    troubles = cycle(Trouble)
    seeds = range(arguments.seed, arguments.seed + arguments.rounds)
    for seed in track(seeds, description="rounds", console=console):
        with tempfile.TemporaryDirectory() as directory:
            try:
                reports.append(run_round(Path(directory), seed, next(troubles), requests=arguments.requests))
            except RoundFailed as error:
                failures.append(str(error))
                console.print(f"[red]{error}")
    console.print(summary(reports))
    return 1 if failures else 0


def summary(reports: list[Report]) -> str:
    """Return what all rounds came to."""

    def total(name: str) -> int:
        return sum(getattr(report, name) for report in reports)

    kills = sum(len(report.kills) for report in reports)
    return (
        f"{len(reports)} rounds held: {total('driven'):,} requests, {kills} kills;"
        f" {total('acknowledged'):,} acknowledged and all of them billed once,"
        f" {total('given_up_by_kong')} given up by Kong,"
        f" {total('sent_again_by_kong')} sent again by Kong,"
        f" {total('duplicates_received')} duplicates that the metering API left out."
    )


if __name__ == "__main__":
    sys.exit(main())
