"""`make bench`: what plugin server and syncd cost, as ratios against peers measured in the same run."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from tests.bench import ai_settings, backlog, beside, dashboard, gateway, kong_gate, plugin, syncd
from tests.bench.goals import Goal
from tests.bench.processes import MIB, end_cleanly
from tests.demo.real_kong import KongMissing

console = Console()


def main() -> int:
    """Run the benchmarks; the exit status is 1 if a goal is missed."""
    options = argparse.ArgumentParser(prog="make bench")
    options.add_argument("--rounds", type=int, help="times that each server is measured (5; with Kong 15)")
    options.add_argument("--events", type=int, default=1_000_000, help="for the memory over a long run")
    options.add_argument("--drain", type=int, default=200_000, help="events in the backlog that is drained")
    options.add_argument("--kong", action="store_true", help="measure a real kong from the PATH instead")
    options.add_argument(
        "--seconds", type=int, default=4, help="of each run with Kong, and beside http-log posts"
    )
    options.add_argument("--concurrency", type=int, default=plugin.CONCURRENCY, help="with Kong")
    options.add_argument("--workers", type=int, default=1, help="of nginx, with Kong")
    options.add_argument("--one-core", action="store_true", help="with Kong: everything on one core")
    options.add_argument(
        "--postgres",
        action="store_true",
        help="with --only lua or gate: on the empty database that KONG_PG_* name, else on one of its own",
    )
    options.add_argument("--backlog", type=float, default=5.0, help="GiB that wait when a server is started")
    parts = ("servers", "drain", "memory", "backlog", "beside", "ai", "syncd", "dashboard")
    options.add_argument(
        "--only",
        choices=("plugin", *parts, "lua", "gate"),
        help="measure this alone; plugin: all but syncd's; lua, gate: with Kong",
    )
    arguments = options.parse_args()
    end_cleanly()
    in_lua = arguments.only in ("lua", "gate")
    if in_lua > arguments.kong or arguments.postgres > in_lua:
        options.error("--only lua and gate need --kong, and --postgres needs one of them")
    if arguments.kong:
        return gateways(arguments)
    rounds = arguments.rounds or 5

    with console.status("starting") as status:

        def tell(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(what)

        goals: list[Goal] = []
        wanted = {None: parts, "plugin": parts[:-2]}.get(arguments.only, (arguments.only,))
        if "servers" in wanted:
            goals += servers(rounds, tell)
        if "drain" in wanted:
            goals += draining(arguments.drain, rounds, tell)
        if "memory" in wanted:
            goals += remembering(arguments.events, tell)
        if "backlog" in wanted:
            goals += backlog.run(arguments.backlog, console, tell)
        if "beside" in wanted:
            goals.append(beside.run(arguments.seconds, console, tell))
        if "ai" in wanted:
            goals.append(ai_settings.run(20 * rounds, console, tell))
        goals += syncds(wanted, rounds, tell)
    return verdict(goals)


def syncds(wanted: Sequence[str], rounds: int, tell: Callable[[str], None]) -> list[Goal]:
    """Measure syncd and its dashboard, if wanted."""
    goals = syncd.run(rounds, console, tell) if "syncd" in wanted else []
    return goals + (dashboard.run(console, tell) if "dashboard" in wanted else [])


def verdict(goals: list[Goal]) -> int:
    """Print the goals and return the exit status."""
    table = Table(title="Goals", title_justify="left")
    for name in ("what", "goal", "measured", "met"):
        table.add_column(name)
    for goal in goals:
        table.add_row(goal.what, goal.wanted, goal.measured, "yes" if goal.met else "[red]no")
    console.print(table)
    return 0 if all(goal.met for goal in goals) else 1


def gateways(arguments: argparse.Namespace) -> int:
    """Compare what metering costs a real Kong."""
    rounds, only_lua = arguments.rounds or 15, arguments.only == "lua"
    try:
        with console.status("starting") as status:
            if arguments.only == "gate":
                measured = kong_gate.run(rounds, status.update, postgres=arguments.postgres)
                return verdict(kong_gate.report(measured, console))
            ways, missing = gateway.run(
                rounds,
                arguments.seconds,
                status.update,
                arguments.concurrency,
                arguments.workers,
                only_lua=only_lua,
                one_core=arguments.one_core,
                postgres=arguments.postgres,
            )
    except KongMissing as error:
        console.print(f"[red]{error}")
        return 1
    return verdict(gateway.report(ways, missing, console))


def servers(rounds: int, tell: Callable[[str], None]) -> list[Goal]:
    """Compare the servers."""
    results = plugin.compare(rounds, tell)
    table = Table(title=f"Medians of {rounds} interleaved runs, concurrency 32", title_justify="left")
    for name in ("server", "CPU us/event", "events/s", "PSS MiB"):
        table.add_column(name, justify="left" if name == "server" else "right")
    for name, runs in results.items():
        table.add_row(
            name,
            f"{statistics.median(r.cpu_us for r in runs):.0f}",
            f"{statistics.median(r.rate for r in runs):,.0f}",
            f"{statistics.median(r.pss for r in runs) / MIB:.0f}",
        )
    console.print(table)
    gevent = 1 / plugin.ratios(results, "kong-pdk, gevent", lambda m: m.cpu_us)
    threads = 1 / plugin.ratios(results, "kong-pdk, threads", lambda m: m.cpu_us)
    rate = plugin.ratios(results, "kong-pdk, gevent", lambda m: m.rate)
    bare = plugin.ratios(results, "bare asyncio server", lambda m: m.cpu_us)
    segments = statistics.median(r.cpu_us for r in results[plugin.SEGMENTS])
    detail = f"{segments:.0f} us"
    return [
        Goal("CPU per event from Kong segments, delivered", "25 us or less", detail, segments <= 25),
        Goal("CPU per event, kong-pdk gevent / ours", "3 or more", f"{gevent:.1f}", gevent >= 3),
        Goal("CPU per event, kong-pdk threads / ours", "10 or more", f"{threads:.1f}", threads >= 10),
        Goal("CPU per event, ours with delivery / bare server", "2.5 or less", f"{bare:.1f}", bare <= 2.5),
        Goal("events/s, ours / kong-pdk gevent", "3 or more", f"{rate:.1f}", rate >= 3),
    ]


def draining(events: int, rounds: int, tell: Callable[[str], None]) -> list[Goal]:
    """Compare delivery with a bare loop."""
    drains = plugin.drain(events, rounds, tell)
    ratio = statistics.median(drain.ratio for drain in drains)
    ours = statistics.median(events / drain.ours for drain in drains)
    bare = statistics.median(events / drain.bare for drain in drains)
    detail = f"{ratio:.2f} ({ours:,.0f} of {bare:,.0f} events/s)"
    return [Goal("backlog drain, ours / bare httpx loop", "0.9 or more", detail, ratio >= 0.9)]


def remembering(events: int, tell: Callable[[str], None]) -> list[Goal]:
    """Look at the memory over a long run."""
    memory = plugin.memory(events, tell)
    growth = memory.late / memory.early
    return [
        Goal(f"memory after {events:,} events / at the start", "1.2 or less", f"{growth:.2f}", growth <= 1.2),
        *(
            Goal(f"memory, {when}", "under 120 MiB", f"{size / MIB:.0f} MiB", size < 120 * MIB)
            for when, size in (("in the end", memory.late), (f"{events:,} events waiting", memory.waiting))
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
