"""The console script `openmeter-plugin`.

Before any slow import, `info` answers (Kong waits for it when it starts) and `serve` listens: requests
that Kong serves before that lose their events.
"""

from __future__ import annotations

import contextlib
import sys


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["info"]:
        from openmeter_plugin.config.schema import info_json

        sys.stdout.write(info_json())
        return
    early = None
    if sys.argv[1:2] == ["serve"]:
        from openmeter_plugin.process.sockets import Listeners, listen_early
        from openmeter_plugin.process.systemd import ActivationError, use_passed_sockets

        early = Listeners()
        with contextlib.suppress(ActivationError):  # the command line meets it again and reports it
            use_passed_sockets(early)
            listen_early(sys.argv[2:], early)
    from openmeter_plugin.cli.main import run

    run(early)


if __name__ == "__main__":
    main()
