"""Waits until Kong has gone and the spool is delivered. Its argument: the port of Kong's status listener.

Kubernetes runs this together with Kong's own preStop hook, while both still serve. In any case the
pod ends when its grace period does.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

CALM = 2.0
"""Seconds. Kong hands over the last logs from a timer, after its listener has closed."""


def kong_listens(port: int) -> bool:
    """Return whether Kong's status listener still accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def left() -> int:
    """Return how many events are not delivered; -1 if that is unknown at the moment."""
    command = ["openmeter-plugin", "spool", "status", "--output=json"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no input
    try:
        return int(json.loads(asked.stdout)["total"]["backlog"])
    except (ValueError, KeyError, TypeError):
        return -1


def main(port: int) -> None:
    """Wait until Kong has gone and the backlog is empty."""
    while kong_listens(port):
        time.sleep(0.2)
    time.sleep(CALM)
    while left() != 0:
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
