"""`make demo`: the main job, end to end, on this machine alone.

Starts the metering sandbox and the plugin server, drives the server over its Unix socket with what a real
Kong sends, has syncd turn the consumers and applications behind it into customers, and reads the bill
back. Ends with 0 only if every request that was driven is in the bill exactly once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.demo import gate, real_kong
from tests.demo.gateway import Gateway
from tests.demo.traffic import Expected, traffic
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import eventually, plugin_server

APPLICATIONS: Final = Path(__file__).parents[2] / "docs" / "examples" / "applications.json"
REQUESTS: Final = 20_000
REQUESTS_KONG: Final = 5_000
CONCURRENCY: Final = 32
TOKEN: Final = "demo-token"
DELIVERY_SECONDS: Final = 60.0

console = Console()


class DemoFailed(RuntimeError):
    """What was driven and what is billed differ, or a step did not do what it must."""


def main() -> int:
    """Run the demo and return its exit status."""
    options = argparse.ArgumentParser(prog="make demo")
    options.add_argument("--kong", action="store_true", help="use a real kong from the PATH")
    options.add_argument("--lua", action="store_true", help="with --kong, meter by the plugin in Lua")
    options.add_argument("--requests", type=int, help="how many to drive")
    arguments = options.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="kong-openmeter-demo-") as directory:
            run(Path(directory), use_kong=arguments.kong, requests=arguments.requests, in_lua=arguments.lua)
    except (DemoFailed, real_kong.KongMissing) as error:
        console.print(f"[red bold]The demo failed:[/] {error}")
        return 1
    return 0


def run(directory: Path, *, use_kong: bool, requests: int | None, in_lua: bool = False) -> None:
    """Run every step; raises DemoFailed."""
    expected = Expected()
    with ExitStack() as stack:
        sandbox = stack.enter_context(running_sandbox(directory))
        console.print(f"metering sandbox  {sandbox}")
        if use_kong:
            gateway = drive_real_kong(
                stack, directory, sandbox, requests or REQUESTS_KONG, expected, in_lua=in_lua
            )
        else:
            gateway = drive_recordings(stack, directory, sandbox, requests or REQUESTS, expected)
        wait_for_delivery(sandbox, expected)
        gateway.write(directory / "kong.yml")
        reconcile(directory, sandbox)
        show_and_check(directory, sandbox, expected)
        show_gate(directory)


def drive_recordings(
    stack: ExitStack, directory: Path, sandbox: str, count: int, expected: Expected
) -> Gateway:
    """Drive the plugin server over its socket with recorded requests."""
    gateway = Gateway.load(f"{sandbox}/api/v1/events")
    server = stack.enter_context(plugin_server(directory))
    console.print(f"plugin server     {server.socket}")
    drive(server.socket, gateway, count, expected)
    return gateway


def drive(socket: Path, gateway: Gateway, count: int, expected: Expected) -> None:
    """Send recorded requests to the socket of a plugin server, as Kong does."""
    plugin = PluginInstance(gateway.plugin_config(TOKEN))

    async def send(advance: Callable[[], None]) -> None:
        worker = KongWorker(socket)
        pending = traffic(gateway.consumers, count, expected)

        async def lane() -> None:
            for request in pending:
                if not await worker.log(plugin, request):
                    raise DemoFailed("the plugin server refused a request")
                advance()

        await worker.start(plugin)
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(lane())
        await worker.close()

    with progress(count, "requests, as Kong sends them") as advance:
        asyncio.run(send(advance))


def drive_real_kong(
    stack: ExitStack, directory: Path, sandbox: str, count: int, expected: Expected, *, in_lua: bool
) -> Gateway:
    """Send requests through a real Kong, which talks to the plugin server or writes Kong segments."""
    upstream = stack.enter_context(real_kong.upstream())
    gateway = Gateway.load(f"{sandbox}/api/v1/events", upstream)
    segments = directory / "segments" if in_lua else None
    server = stack.enter_context(
        plugin_server(directory, *(("--segments", str(segments)) if segments else ()))
    )
    console.print(f"plugin server     {segments or server.socket}")
    proxy = stack.enter_context(real_kong.kong(directory, gateway, server.socket, TOKEN, segments))
    console.print(f"Kong              {proxy}")
    with progress(count, "requests through Kong") as advance:
        real_kong.drive(proxy, gateway, count, expected, advance)
    return gateway


def wait_for_delivery(sandbox: str, expected: Expected) -> None:
    """Wait until the events have arrived, as far as they do."""
    with progress(expected.events, "events delivered") as advance:
        shown, deadline = 0, time.monotonic() + DELIVERY_SECONDS
        while shown < expected.events:
            stored = min(stats(sandbox)["events_stored"], expected.events)
            for _ in range(stored - shown):
                advance()
            shown = stored
            if time.monotonic() > deadline:
                raise DemoFailed(f"{expected.events - shown} events did not arrive")
            time.sleep(0.05)


def reconcile(directory: Path, sandbox: str) -> None:
    """Have syncd show its plan, carry it out, and find nothing more to do."""
    config = {
        "sources": [
            {"type": "declarative-file", "path": "kong.yml"},
            {"type": "applications-file", "path": str(APPLICATIONS)},
        ],
        "metering": {"dialect": "openmeter-v1", "url": sandbox, "token": TOKEN},
        "mapping": {"group_by": "tag"},
    }
    (directory / "syncd.yaml").write_text(yaml.safe_dump(config))
    syncd(directory, "plan", status=2)
    syncd(directory, "apply", "--yes", status=0, quiet=True)
    syncd(directory, "plan", status=0)


def syncd(directory: Path, *arguments: str, status: int, quiet: bool = False) -> str:
    """Run a syncd command as the operator would; raises DemoFailed for another exit status."""
    command = [str(Path(sys.executable).with_name("syncd")), *arguments]
    if not quiet:
        console.rule(f"syncd {' '.join(arguments)}", align="left")
    result = subprocess.run(
        command,
        cwd=directory,
        text=True,
        capture_output=quiet,
        env=os.environ | {"SYNCD_CONFIG": "syncd.yaml", "STATE_DIRECTORY": str(directory / "state")},
    )
    if result.returncode != status:
        output = f"\n{result.stdout}{result.stderr}" if quiet else ""
        raise DemoFailed(f"syncd {arguments[0]} ended with {result.returncode} instead of {status}{output}")
    return result.stdout or ""


def show_and_check(directory: Path, sandbox: str, expected: Expected) -> None:
    """Print the bill, read back from the metering API, and compare it with what was driven."""
    usage = json.loads(syncd(directory, "usage", "--sort=name", "--output=json", status=0, quiet=True))
    received = stats(sandbox)
    table = Table(title="What each customer used", title_justify="left")
    for name in ("customer", "subjects"):
        table.add_column(name, overflow="fold")
    for name in ("requests", "tokens"):
        table.add_column(name, justify="right")
    for customer in usage["customers"]:
        subjects = [subject["key"] for subject in customer["subjects"]]
        table.add_row(
            customer["name"], "\n".join(subjects), f"{customer['requests']:,}", f"{customer['tokens']:,}"
        )
    table.add_section()
    table.add_row("unbilled", _listed(usage["unbilled"]), "", "")
    table.add_row("duplicates received", str(received["duplicates_received"]), "", "")
    table.add_row("skipped", f"{expected.skipped:,} requests without a consumer", "", "")
    console.print(table)
    check(usage, received, expected)
    console.print(
        f"[green bold]Every one of the {sum(expected.requests.values()):,} metered requests is counted"
        f" exactly once.[/]"
    )


def show_gate(directory: Path) -> None:
    """Let a customer use up what is left, and show what the next request gets."""
    passed, answer = gate.drive(directory / "gate")
    if (passed, answer.status) != (gate.ALLOWANCE, httpx.codes.TOO_MANY_REQUESTS):
        raise DemoFailed(f"{passed} of {gate.ALLOWANCE} requests passed the gate, then {answer}")
    console.print(
        f"[green bold]With {gate.ALLOWANCE} requests left, {passed} pass the gate,[/] and the next one is"
        f" answered {answer.status} {answer.reason}."
    )


def check(usage: dict[str, Any], received: dict[str, Any], expected: Expected) -> None:
    """Compare subject by subject; raises DemoFailed with each difference."""
    lines = [subject for customer in usage["customers"] for subject in customer["subjects"]]
    requests = {line["key"]: line["requests"] for line in lines if line["requests"]}
    tokens = {line["key"]: line["tokens"] for line in lines if line["tokens"]}
    problems = [
        f"{what} of {subject}: driven {driven.get(subject, 0)}, billed {billed.get(subject, 0)}"
        for what, driven, billed in (
            ("requests", expected.requests, requests),
            ("tokens", expected.tokens, tokens),
        )
        for subject in sorted(driven.keys() | billed.keys())
        if driven.get(subject, 0) != billed.get(subject, 0)
    ]
    if usage["unbilled"]:
        problems.append(f"belongs to no customer: {_listed(usage['unbilled'])}")
    if received["duplicates_received"]:
        problems.append(f"{received['duplicates_received']} events arrived twice")
    if received["events_stored"] != expected.events:
        problems.append(f"{expected.events} events were due, {received['events_stored']} are stored")
    if problems:
        raise DemoFailed("\n".join(problems))


def _listed(subjects: list[dict[str, Any]]) -> str:
    return ", ".join(subject["key"] for subject in subjects) or "nothing"


def stats(sandbox: str) -> dict[str, Any]:
    """Return the sandbox's own counts."""
    answer = httpx.get(
        f"{sandbox}/sandbox/v1/stats", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False
    )
    result: dict[str, Any] = answer.raise_for_status().json()
    return result


@contextmanager
def running_sandbox(directory: Path) -> Iterator[str]:
    """Run `syncd sandbox` and yield its URL, which it prints when it listens."""
    log = directory / "sandbox.log"
    command = [str(Path(sys.executable).with_name("syncd")), "sandbox", "--port", "0", "--token", TOKEN]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--db", str(directory / "sandbox.db")], stderr=stderr)
    try:

        def url() -> str:
            words = log.read_text().split()
            return next((word for word in words if word.startswith("http://")), "")

        yield eventually(url, what="the sandbox's start")
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """Show a bar while something advances; a plain line where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done % 100 == 0 or done == total:
                bar.update(task, completed=done)

        yield advance


if __name__ == "__main__":
    sys.exit(main())
