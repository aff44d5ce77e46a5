"""The plugin for stock kong-pdk (`kong-python-pluginserver -d "$(openmeter-plugin pdk-dir)"`).

It writes the same events into the same spool; only the input differs. `openmeter-plugin serve` is
recommended: it is faster and loses less when it is killed. This is for installations that run kong-pdk
already.

A handler that raises or never returns hangs kong-pdk 0.36 for good (measured in all its modes), so nothing
here raises and every wait has a timeout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.config.schema import FIELDS, PRIORITY, VERSION
from openmeter_plugin.instances.instance import Instance, InstanceIds, start_instance
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.log import RateLimit, configure_logging, get_logger
from openmeter_plugin.metering.kong_log import NO_RESULTS, PdkQuery
from openmeter_plugin.metering.lenient_json import encode_json
from openmeter_plugin.spool.destination import DEFAULT_SPOOL, make_private
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_WAIT: Final = 2.0  # seconds for the disk; after that Kong is answered anyway

_PDK_CALLS: Final[Mapping[PdkQuery, Callable[[Any], Any]]] = {
    PdkQuery.APPLICATION: lambda kong: kong.ctx.shared.get("kaa_application_context"),
    PdkQuery.CAPTURES: lambda kong: kong.request.get_uri_captures(),
}

Schema = FIELDS
version = VERSION
priority = PRIORITY


class _Shared:
    """The state that all instances of this process share: the spool's writer and a delivery process."""

    def __init__(self) -> None:
        configure_logging("kong-pdk")
        self.spool = Path(os.environ.get("OPENMETER_PLUGIN_SPOOL", DEFAULT_SPOOL))
        make_private(self.spool)
        self.writer = SpoolWriter(self.spool, _set_all)
        self.writer.start()
        self.ids = InstanceIds(self.spool)
        self.unwritten_limit = RateLimit()
        self._delivery_limit = RateLimit(5.0)
        self._delivery: subprocess.Popen[bytes] | None = None
        self.keep_delivering()

    def keep_delivering(self) -> None:
        """Keep a delivery process running; checks at most every few seconds.

        It ends when its pipe closes, that is with this process, and waits while another one delivers this
        spool. The kernel's parent-death signal would not do: it comes when the *thread* that forked ends.
        """
        if not self._delivery_limit.passes():
            return
        if self._delivery is None or self._delivery.poll() is not None:
            command = [sys.executable, "-m", "openmeter_plugin", "deliver", "--spool", str(self.spool)]
            self._delivery = subprocess.Popen(  # noqa: S603 - our own module, in this interpreter
                [*command, "--with-parent"], stdin=subprocess.PIPE
            )


def _set_all(tokens: list[threading.Event]) -> None:
    for token in tokens:
        token.set()


_shared_state: _Shared | None = None
_shared_lock = threading.Lock()


def _get_shared() -> _Shared:
    global _shared_state  # noqa: PLW0603 - kong-pdk has no other place for shared state
    with _shared_lock:
        if _shared_state is None:
            _shared_state = _Shared()
        return _shared_state


class Plugin:
    """One instance of the plugin, as kong-pdk creates it: `config` is Kong's configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._instance: Instance | None = None
        try:
            shared = _get_shared()
            self._instance = start_instance(next(shared.ids), encode_json(config), shared.writer)
        except Exception:
            get_logger().critical(
                "spool_unusable",
                consequence="usage is lost",
                remedy="set OPENMETER_PLUGIN_SPOOL",
                exc_info=True,
            )

    def log(self, kong: Any) -> None:
        """Meter a request; Kong calls this once the client has its response."""
        try:
            self._log(kong)
        except BaseException:
            get_logger().exception("request_not_metered")

    def _log(self, kong: Any) -> None:
        # Make a PDK call before anything else: until the first one, kong-pdk serves no other request.
        log = _bytes(_data(kong.log.serialize()))
        if self._instance is None:
            return
        results = NO_RESULTS
        record = spool_record(self._instance, log, results)
        while isinstance(record, PdkQuery):
            results = results.with_result(record, _data(_PDK_CALLS[record](kong)))
            record = spool_record(self._instance, log, results)
        queue, encoded = record
        shared = _get_shared()
        shared.keep_delivering()
        written = threading.Event()
        shared.writer.append(queue, encoded, written)
        if not written.wait(_MAX_WAIT) and shared.unwritten_limit.passes():
            get_logger().error("spool_slow", waited_seconds=_MAX_WAIT)


def _data(answer: Any) -> Any:
    """Return the data of a PDK call, which kong-pdk returns together with an error by default."""
    return answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 2 else answer


def _bytes(log: Any) -> bytes:
    """Return the serialized log as bytes; kong-pdk decodes it to a text, or to its value."""
    if isinstance(log, str):
        return log.encode("utf-8", "surrogateescape")
    return log if isinstance(log, bytes) else encode_json(log)
