"""The gate's part of `make demo`: a customer with 100 requests left is stopped at the 101st.

The gate is the real process, and so is its socket. Kong's half is the plugin `openmeter-gate` in LuaJIT, with
a stand-in for nginx around it: no Kong is needed. `docs/gate.md` has the same with one.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Final

from syncd.sandbox.testing import running_sandbox
from tests.plugin.gate.test_process import Node
from tests.plugin.lua.both_halves import Gateway
from tests.plugin.lua.gate_node import Answer, UnixPeer

ALLOWANCE: Final = 100
_SECONDS: Final = 60.0


def drive(directory: Path) -> tuple[int, Answer]:
    """Send requests until the customer's are used up; return how many passed, and the next answer."""
    directory.mkdir()
    with running_sandbox() as url, closing(Node(directory, url)) as server:
        server.customer(ALLOWANCE)
        with server.running(), UnixPeer() as peer:
            kong = Gateway(server, peer)
            kong.until(kong.known, _SECONDS)
            time.sleep(0.2)  # until no worker remembers the first line, which has no limit yet
            deadline = time.monotonic() + _SECONDS
            while kong.passed < ALLOWANCE and time.monotonic() < deadline:
                # What a reading may have counted is taken off twice until the next one: the last may wait.
                if not kong.answer().passed:
                    time.sleep(0.01)
            return kong.passed, kong.answer()
