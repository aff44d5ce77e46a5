"""`make screenshots`: every page of the dashboard, at both sizes and in both schemes, from a seeded world.

The world is the same each time: a sandbox with 45 days of usage of fourteen consumers, a plugin server whose
spool keeps dead letters and quarantined requests, and a daemon that has synced. The pictures go to
screenshots/, and those that README.md shows to docs/images/ too.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx
import orjson
import yaml

from openmeter_plugin.api.access import TOKEN_VARIABLE
from openmeter_plugin.books.store import Accounting, Books, DeadLetter, Delivery, LedgerKey
from openmeter_plugin.spool.destination import write_destination
from tests.checkout import ROOT
from tests.demo.__main__ import TOKEN, running_sandbox
from tests.harness.process import eventually, plugin_server
from tests.plugin.spools import QUEUE, destination
from tests.syncd.dashboard.browser import SCHEMES, SIZES, Browser, browser, crawled, emulated

FOLDER: Final = ROOT / "screenshots"
IN_README: Final = {"": "dashboard.png", "customers": "customers.png"}
"""By page, the pictures of a desktop in the light scheme that docs/images has."""
DAYS: Final = 45
CUSTOMERS: Final = {
    "acme": ("acme-web", "acme-mobile", "acme-batch"),
    "globex": ("globex-portal", "globex-partner-api"),
    "initech": ("initech-reports",),
    "umbrella-health": ("umbrella-clinic", "umbrella-lab"),
    "northwind": ("northwind-shop", "northwind-warehouse"),
    "stark": ("stark-telemetry",),
    "wayne": ("wayne-security", "wayne-research"),
    "hooli": ("hooli-search",),
}
MODELS: Final = ("gpt-4o", "claude-sonnet-4", "mistral-large")
ROUTES: Final = ("orders", "invoices", "search", "chat")
PRICES: Final = {
    "currency": "EUR",
    "rates": [
        {"meter": "kong_api_requests", "amount": 0.002},
        {"meter": "kong_llm_tokens", "amount": 4, "per": 1_000_000},
    ],
}


def main() -> None:
    """Take the pictures."""
    with ExitStack() as stack:
        # The dashboard shows the paths of files, so the folder has a name that is fit to be seen.
        directory = Path(tempfile.gettempdir()) / "kong-openmeter"
        directory.mkdir()
        stack.callback(shutil.rmtree, directory)
        sandbox = stack.enter_context(running_sandbox(directory))
        write_consumers(directory / "kong.yml")
        seed_spool(directory / "spool", f"{sandbox}/api/v1/events")
        api = f"127.0.0.1:{free_port()}"
        environment = {TOKEN_VARIABLE: TOKEN * 2}
        stack.enter_context(plugin_server(directory, "--api", api, environment=environment))
        url = stack.enter_context(running_daemon(directory, sandbox, api))
        window = stack.enter_context(browser(directory / "profile"))
        taken = take_all(window, url)
    print(f"{taken} pictures in {FOLDER}")


def write_consumers(path: Path) -> None:
    """Write Kong's declarative file: each consumer with the customer it belongs to."""
    consumers = [
        {"username": name, "id": consumer_id(name), "tags": [f"customer:{customer}"]}
        for customer, names in CUSTOMERS.items()
        for name in names
    ]
    path.write_text(yaml.safe_dump({"_format_version": "3.0", "consumers": consumers}))


def consumer_id(name: str) -> str:
    """Return an id that looks like Kong's and is the same each time."""
    generator = random.Random(name)
    digits = f"{generator.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def seed_spool(spool: Path, endpoint: str) -> None:
    """Write dead letters of two causes and quarantined requests into the books."""
    write_destination(spool, destination(endpoint, token=TOKEN))
    line = LedgerKey(f"{datetime.now(UTC):%Y-%m-%dT%H}", "kong.api_request", "consumer:acme")
    schema = {"title": "Bad Request", "status": 400, "detail": "data.request_size: must be an integer"}
    late = "older than 2 days (--max-age); the metering API was not reachable for that long"
    answers = [(400, orjson.dumps(schema).decode())] * 7 + [(None, late)] * 2
    with closing(Books(spool)) as books:
        letters = []
        for number, (status, answer) in enumerate(answers, 1):
            generator = random.Random(number)
            event = a_request(f"dead-{number}", "acme-batch", datetime.now(UTC), generator)
            letters.append(DeadLetter(orjson.dumps(event), status, answer))
        lines = Counter({line: len(letters)})
        read = Accounting(accepted=lines)
        read.counts.update({("events", ""): len(letters), ("metered", ""): len(letters)})
        kept = Accounting(quarantined=[quarantined(number) for number in range(12)])
        for queue, accounting in ((QUEUE, read), ("quarantine", kept)):
            accounting.count_requests()
            books.account(queue, accounting)
        outcome = Delivery({}, dead_lettered=lines, dead_letters=letters, events=len(letters))
        books.deliver(QUEUE, outcome)


def quarantined(number: int) -> tuple[str, bytes]:
    """Return the reason and record of a request in quarantine."""
    reason = "no_consumer" if number % 3 else "consumer_without_field"
    log: dict[str, Any] = {
        "request": {"id": f"q{number}", "method": "GET"},
        "response": {"status": 200},
        "route": {"name": ROUTES[number % len(ROUTES)]},
        "service": {"name": "shop"},
        "started_at": int((time.time() - number * 600) * 1000),
    }
    if reason != "no_consumer":
        log["consumer"] = {"username": "legacy-client"}
    return reason, orjson.dumps({"reason": reason, "log": log, "application": None, "destination": QUEUE})


def a_request(number: str, consumer: str, at: datetime, generator: random.Random) -> dict[str, Any]:
    """Return the event of a request."""
    return {
        "specversion": "1.0",
        "id": number,
        "source": "kong",
        "type": "kong.api_request",
        "subject": f"consumer:{consumer_id(consumer)}" if consumer != "healthcheck" else consumer,
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {"route_name": generator.choice(ROUTES), "status": "200", "request_method": "GET"},
    }


def seed_usage(sandbox: str) -> None:
    """Send the usage of the last days: weekdays above weekends, some customers growing, one that stopped."""
    generator = random.Random(7)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    headers = {
        "authorization": f"Bearer {TOKEN}",
        "content-type": "application/cloudevents-batch+json",
    }
    names = [name for several in CUSTOMERS.values() for name in several]
    with httpx.Client(base_url=sandbox, headers=headers, trust_env=False, timeout=60) as client:
        for day in range(DAYS + 1):
            start = today - timedelta(days=DAYS - day)
            batch: list[dict[str, Any]] = []
            for weight, name in enumerate(names, 2):
                if name == "stark-telemetry" and day > DAYS - 12:
                    continue
                growth = 1 + (day / DAYS if weight % 3 == 0 else 0)
                number = int(
                    generator.uniform(0.7, 1.3) * weight * growth * (0.4 if start.weekday() > 4 else 1)
                )
                batch += usage_of(name, start, number, generator)
            batch += usage_of("healthcheck", start, 4, generator) if day > DAYS - 9 else []
            client.post("/api/v1/events", json=batch).raise_for_status()


def usage_of(name: str, start: datetime, number: int, generator: random.Random) -> list[dict[str, Any]]:
    """Return the events of a consumer's day: requests, and calls to models of some."""
    found = []
    limit = min(86_399.0, (datetime.now(UTC) - start).total_seconds())
    for count in range(number):
        at = start + timedelta(seconds=generator.uniform(0, limit))
        request = a_request(f"{name}-{start:%m%d}-{count}", name, at, generator)
        found.append(request)
        if count % 5 == 0:
            data = {"model": generator.choice(MODELS), "type": generator.choice(("input", "output"))}
            call = {"type": "kong.llm_request", "id": f"{request['id']}-ai"}
            found.append(request | call | {"data": data | {"tokens": generator.randrange(200, 9000)}})
    return found


@contextmanager
def running_daemon(directory: Path, sandbox: str, api: str) -> Iterator[str]:
    """Run `syncd run` with meters, usage and a second run; yields the dashboard's URL."""
    listen = f"127.0.0.1:{free_port()}"
    config = {
        "owner_id": "production",
        "sources": [{"type": "declarative-file", "name": "kong", "path": "kong.yml"}],
        "metering": {"url": sandbox, "token": TOKEN},
        "mapping": {"group_by": "tag"},
        "gateways": [{"name": "eu-1", "url": f"http://{api}", "token": TOKEN * 2}],
        "schedule": {"interval": "1h"},
        "prices": PRICES,
        "daemon": {"listen": listen},
    }
    (directory / "syncd.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "SYNCD_CONFIG": str(directory / "syncd.yaml"),
        "STATE_DIRECTORY": str(directory / "state"),
    }
    syncd = str(Path(sys.executable).with_name("syncd"))

    def call(*arguments: str) -> None:
        subprocess.run([syncd, *arguments], env=environment, check=False, stdout=subprocess.DEVNULL)

    call("meters", "apply", "--ai")
    seed_usage(sandbox)
    with (directory / "syncd.log").open("wb") as log:
        process = subprocess.Popen([syncd, "run"], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://{listen}"
        eventually(lambda: answers(f"{url}/readyz"), what="the daemon's first run", seconds=60)
        call("resync", "--wait")
        call("resync", "--wait", "--dry-run")
        eventually(lambda: has_refreshed(url), what="the usage of all days", seconds=300)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def has_refreshed(url: str) -> bool:
    """Say whether the first refresh of usage is over."""
    page = httpx.get(f"{url}/dashboard/usage", trust_env=False, timeout=20)
    return page.is_success and "refresh is still running" not in page.text


def answers(url: str) -> bool:
    """Say whether something answers 200."""
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def take_all(window: Browser, url: str) -> int:
    """Take each page that links lead to; returns how many pictures there are."""
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        pages = crawled(client)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for kind, path in pages.items():
        for size in SIZES:
            for scheme in SCHEMES:
                name = f"{kind.replace('/', '-') or 'overview'}-{size}-{scheme}.png"
                with emulated(window, size, scheme):
                    window.open(f"{url}{path}")
                    window.save(FOLDER / name)
        if kind in IN_README:
            source = FOLDER / f"{kind.replace('/', '-') or 'overview'}-desktop-light.png"
            shutil.copy(source, ROOT / "docs" / "images" / IN_README[kind])
    return len(pages) * len(SIZES) * len(SCHEMES)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
