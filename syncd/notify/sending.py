"""Sending through Apprise, in a process of its own that is killed after a time.

Apprise talks to a hundred services, each in its own way and with its own time-outs, and a thread cannot be
stopped. As a process it can, and the daemon neither loads its 700 modules nor logs what it says. The URLs,
which are secrets, go through its standard input.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openmeter_plugin.foreign import foreign_text
from syncd.config.sections import schema_of

_LEAST_SECRET = 4
"""Characters of a part of a URL that is masked; shorter ones occur in ordinary words."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A URL by its position in `notify.urls`, and why nothing could be sent there; it contains no secret."""

    index: int
    name: str
    reason: str


def target_name(index: int, url: str) -> str:
    """Return how messages name a URL: ``notify.urls[0] (slack)``."""
    return f"notify.urls[{index}] ({schema_of(url)})"


def send(
    urls: Sequence[str], title: str, body: str, timeout: float, stopping: threading.Event | None = None
) -> list[Failure]:
    """Send a message to all URLs and return those that failed, after `timeout` seconds at most."""
    results, status = _outcomes(urls, title, body, timeout, stopping or threading.Event())
    missing = f"no answer within {timeout:g} s" if status is None else f"the sender ended with {status}"
    return [
        Failure(index, target_name(index, url), results.get(index, missing))
        for index, url in enumerate(urls)
        if results.get(index) != ""
    ]


def _outcomes(
    urls: Sequence[str], title: str, body: str, timeout: float, stopping: threading.Event
) -> tuple[dict[int, str], int | None]:
    """Return the reason of each URL's failure, empty for a success, and nothing for those that took too long.

    Besides the exit status of the process, None if it was killed.
    """
    deadline = time.monotonic() + timeout
    with subprocess.Popen(
        # Warnings of a library about its own future are no reason to send nothing.
        [sys.executable, "-W", "ignore", "-m", "syncd.notify.sending"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            assert child.stdin is not None  # noqa: S101 - it is a pipe
            with child.stdin:
                json.dump({"urls": list(urls), "title": title, "body": body}, child.stdin)
            while child.poll() is None and time.monotonic() < deadline and not stopping.wait(0.05):
                pass
        except BrokenPipeError:
            pass  # it ended early; what it has said is read below
        finally:
            status = child.poll()
            child.kill()
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        lines = child.stdout.read().splitlines()
    return dict(json.loads(line) for line in lines), status


def secrets_of(url: str) -> list[str]:
    """Return the texts of an Apprise URL that no message may contain: all but its schema and short words."""
    _, _, rest = url.partition("://")
    return [rest, *(part for part in re.split(r"[/:@?&=,;#]", rest) if len(part) >= _LEAST_SECRET)]


def _main() -> None:
    """Send what standard input says; prints a line for each URL once its outcome is known."""
    import logging

    import apprise

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("apprise").addHandler(Listener(logging.WARNING))
    asked = json.load(sys.stdin)
    for index, url in enumerate(asked["urls"]):
        said.clear()
        # One at a time: several at once would be threads that the process waits for at its end.
        sender = apprise.Apprise()
        reason = ""
        if not sender.add(url):
            reason = "Apprise does not know this kind of URL, or something is missing in it"
        elif not sender.notify(title=asked["title"], body=asked["body"]):
            reason = foreign_text("; ".join(said), secrets_of(url)) or "Apprise does not say why"
        print(json.dumps([index, reason]), flush=True)


if __name__ == "__main__":
    _main()
