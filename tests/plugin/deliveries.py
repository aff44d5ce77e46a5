"""Helpers for delivery tests: write events to a spool, deliver it, and read the books."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson

from openmeter_plugin.books.equations import violations
from openmeter_plugin.delivery.answers import DeliveryError
from openmeter_plugin.delivery.client import EventsClient
from openmeter_plugin.delivery.options import DeliveryOptions, Network, Retention
from openmeter_plugin.delivery.process import deliver
from openmeter_plugin.spool.segment import SKIPPED, encode_record, encode_usage
from tests.harness.books import read_counts, read_ledger
from tests.harness.process import eventually
from tests.plugin.events_server import Answer, Post, Script, refusal
from tests.plugin.spools import QUEUE, destination, running_writer

KEEP_NOTHING = Retention(age=timedelta(0), resend_window=timedelta(0))


def event(
    number: int, *, subject: str = "consumer:alice", time: str = "2026-11-22T05:49:03.779Z", **data: object
) -> bytes:
    """Return an event as the plugin produces it."""
    return orjson.dumps(
        {
            "specversion": "1.0",
            "id": f"event-{number:06d}",
            "source": "kong",
            "type": "kong.api_request",
            "subject": subject,
            "time": time,
            "data": data,
        }
    )


def record(*numbers: int, **members: Any) -> bytes:
    """Return the record of one request with these events and their summary."""
    events = [event(n, **members) for n in numbers]
    first = orjson.loads(events[0])
    return encode_usage(events, [first["type"]] * len(events), first["time"], first["id"], first["subject"])


def skip(reason: str = "no_consumer") -> bytes:
    return encode_record(SKIPPED + reason.encode())


def ids(*ranges: range) -> list[str]:
    return [f"event-{n:06d}" for numbers in ranges for n in numbers]


def spooled(
    spool: Path, records: Sequence[bytes], queue: str = QUEUE, *, each_alone: bool = False, **options: Any
) -> None:
    """Write the records with a writer that then stops; with `each_alone`, each into its own segment."""
    if each_alone:
        options["segment_bytes"] = 1
    groups = [[r] for r in records] if each_alone else [records]
    written: list[Any] = []
    with running_writer(spool, written.extend, **options) as writer:
        for group in groups:
            end = len(written) + len(group)
            for one in group:
                writer.append(writer.queue(queue), one, None)
            eventually(lambda end=end: len(written) == end)  # type: ignore[misc]


def run_until_empty(spool: Path, *, seconds: float = 20, **options: Any) -> None:
    """Deliver the backlog; segments are retained unless `retention` says otherwise."""
    asyncio.run(asyncio.wait_for(deliver(DeliveryOptions(spool, **options), until_empty=True), seconds))


@contextmanager
def delivering(spool: Path, **options: Any) -> Iterator[None]:
    """Run `deliver` in a thread until the end of the block; the test fails if it fails."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(deliver(DeliveryOptions(spool, **options)))
    ended: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()
    assert ended == []


def post_once(url: str, *, network: Network | None = None, **described: Any) -> DeliveryError | None:
    """Post one event, and return the error if it was not delivered."""

    async def post() -> None:
        client = EventsClient(destination(url, **described), network or Network())
        try:
            await client.post([event(1)])
        finally:
            await client.close()

    try:
        asyncio.run(post())
    except DeliveryError as error:
        return error
    return None


def count(spool: Path, name: str, reason: str = "", queue: str = QUEUE) -> int:
    return read_counts(spool).get(queue, Counter())[name, reason]


def delivered(spool: Path, queue: str = QUEUE) -> int:
    return count(spool, "delivered", queue=queue)


def waiting(spool: Path, queue: str = QUEUE) -> int:
    """Return the number of waiting events, according to the books."""
    return count(spool, "waiting", queue=queue)


def assert_balanced(spool: Path) -> None:
    """Check both equations of the books, and the ledger's totals, for every queue."""
    for queue, counts in read_counts(spool).items():
        assert violations(counts) == [], (queue, counts)
        assert counts["violations", ""] == 0
    ledger = read_ledger(spool)
    for queue, counts in read_counts(spool).items():
        lines = [line for line in ledger if line.queue == queue]
        assert counts["events", ""] == sum(line.accepted for line in lines)
        assert counts["delivered", ""] == sum(line.delivered for line in lines)
        assert counts["dead_lettered", ""] == sum(line.dead_lettered for line in lines)


def fails_first(times: int, *answers: Answer) -> Script:
    """Answer the first posts with these answers in turn, then accept everything."""
    left = [answers[n % len(answers)] for n in range(times)]

    def script(post: Post) -> Answer:
        return left.pop(0) if left else Answer()

    return script


def rejects(bad: set[str], status: int = 400) -> Script:
    """Refuse the whole batch because of the first bad event, as OpenMeter does where it does not name it."""

    def script(post: Post) -> Answer:
        for event_id in post.ids:
            if event_id in bad:
                return refusal(status, f"{event_id} is bad")
        return Answer()

    return script
