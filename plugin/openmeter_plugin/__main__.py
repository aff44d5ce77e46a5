"""The console script `openmeter-plugin`.

`info` and the first steps of `serve` are done before anything slow is imported: Kong waits for the one,
and requests that come before the other listens lose their events.
"""

from __future__ import annotations

import contextlib
import sys


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["info"]:
        import json

        from openmeter_plugin.config.schema import plugin_info

        sys.stdout.write(json.dumps(plugin_info()))
        return
    early = None
    if sys.argv[1:2] == ["serve"]:
        from openmeter_plugin.process.sockets import Listeners, listen_early
        from openmeter_plugin.process.systemd import ActivationError, use_passed_sockets

        early = Listeners()
        with contextlib.suppress(ActivationError):  # found again by the command line, which has the words
            use_passed_sockets(early)
            listen_early(sys.argv[2:], early)
    from openmeter_plugin.cli.main import run

    run(early)


if __name__ == "__main__":
    main()
