"""Free TCP ports for servers that must be told their port.

A port that the kernel chose a moment ago is not free for long: another test process gets it for a connection
of its own, and once in a while a test fails. So these lie below the kernel's range (32768 on Linux), and each
test process has a range of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from typing import Final

_FIRST: Final = 20_000
_RANGE: Final = 1_500
_RANGES: Final = 8

_worker = re.search(r"\d+$", os.environ.get("PYTEST_XDIST_WORKER", ""))
_start = _FIRST + _RANGE * ((int(_worker[0]) if _worker else os.getpid()) % _RANGES)
# Where two runs share the machine they do not begin at the same port.
_offsets = itertools.cycle(range(_RANGE))
for _ in range(os.getpid() % _RANGE):
    next(_offsets)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    for offset in itertools.islice(_offsets, _RANGE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", _start + offset))
            except OSError:
                continue
            return _start + offset
    raise AssertionError(f"no port is free from {_start} on")
