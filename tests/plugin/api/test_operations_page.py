"""The consoles of docs/plugin-operations.md: each command prints the lines that the page shows.

Numbers, times and ids differ from spool to spool, so lines are compared without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.documents import blocks
from tests.plugin.events_server import EventsServer
from tests.plugin.spool_commands import run

_VARIES = re.compile(
    r"[0-9a-f]{16}|127\.0\.0\.1:\d+|\d+ (?:d|h|min|s)(?: \d+ (?:h|min|s))?"
    r"|[\d.]+ (?:B|KiB)|event-\d+|[\dTZ:.-]*\d[\dTZ:.-]*"
)
_PLURAL = re.compile(r"\b(event|letter|line|record|request|segment)s\b")


def shape(line: str) -> str:
    """Return a line without the parts that differ from spool to spool."""
    return _PLURAL.sub(r"\1", _VARIES.sub("#", line.replace("not running", "running")))


def consoles() -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield each command of `openmeter-plugin spool` on the page, and the lines below it."""
    for block in blocks("docs/plugin-operations.md", "console"):
        for console in block.text.removeprefix("$ ").split("\n$ "):
            typed, *printed = console.splitlines()
            words = typed.split()
            if words[:2] == ["openmeter-plugin", "spool"]:
                yield tuple(words[2:]), printed


@pytest.mark.parametrize(("arguments", "shown"), list(consoles()), ids=lambda value: " ".join(value)[:30])
def test_a_command_prints_what_the_page_shows(
    arguments: tuple[str, ...],
    shown: list[str],
    history: Path,
    server: EventsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(history.parent)
    config = {
        "ingest_endpoint": server.url,
        "subject": {"missing": "fallback", "fallback_subject": "unassigned"},
    }
    Path("openmeter-plugin.yaml").write_text(yaml.safe_dump(config))
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    printed = {shape(line) for line in result.stdout.splitlines()}
    assert [line for line in shown if shape(line) not in printed] == [], result.stdout


def test_the_page_shows_every_spool_command() -> None:
    shown = {arguments[0] for arguments, _ in consoles()}
    assert shown == {"status", "verify", "dead-letters", "replay", "export", "drain"}
