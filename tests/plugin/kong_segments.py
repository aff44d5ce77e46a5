"""Helpers for tests of the Kong segments input: a running reader, and what it has written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from openmeter_plugin.segments.folder import Folder
from openmeter_plugin.segments.reader import Reader
from openmeter_plugin.spool.destination import QUARANTINE, destination_id
from openmeter_plugin.spool.journal import Journal
from openmeter_plugin.spool.segment import LOST, Record
from tests.harness.kong_segments import ENDPOINT
from tests.plugin.spools import items, running_writer

QUEUE = destination_id(ENDPOINT, "plugin-1")


@contextmanager
def reading(folder: Path, spool: Path, *, settle: bool = True) -> Iterator[Reader]:
    """Run a reader; without `settle` it ends as by kill -9 after its last step."""
    spool.mkdir(exist_ok=True)
    journal = Journal(spool)
    name = f"{os.getpid()}.{secrets.token_hex(8)}"
    opened = Folder(folder)
    try:
        with running_writer(spool, _notify, name=name) as writer:
            reader = Reader(opened, spool, journal, writer, name)
            yield reader
            if settle:
                reader.close()
    finally:
        opened.close()
        journal.close()


def _notify(tokens: list[Any]) -> None:
    for token in tokens:
        if token is not None:
            token.set()


def read_all(folder: Path, spool: Path, steps: int = 20) -> None:
    """Read what is in the folder, by a reader of its own."""
    with reading(folder, spool) as reader:
        for _ in range(steps):
            reader.step()


def ids(spool: Path, queue: str = QUEUE) -> list[str]:
    """Return the ids of the events in a queue, in the order of the records."""
    found = []
    for item in items(spool, queue):
        assert isinstance(item, Record), item
        if item.kind == b"E":
            found += [event["id"] for event in orjson.loads(b"[" + item.events + b"]")]
    return found


def lost(spool: Path) -> dict[str, int]:
    """Return the lost requests in the spool, by cause."""
    found: dict[str, int] = {}
    for item in items(spool, QUARANTINE):
        assert isinstance(item, Record), item
        if item.kind == LOST:
            loss = orjson.loads(item.body)
            found[loss["reason"]] = found.get(loss["reason"], 0) + loss["count"]
    return found
