"""The plugin under stock kong-pdk (`kong-python-pluginserver -d "$(openmeter-plugin pdk-dir)"`).

The same events into the same spool; only the way in differs. `openmeter-plugin serve` is faster and loses
less when it is killed, so it is what we recommend; this is for whoever runs kong-pdk already.

An exception in a handler, or one that never returns, hangs kong-pdk 0.36 for good (measured in all its
modes), so nothing here raises and every wait has an end.
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
from openmeter_plugin.defaults import DEFAULT_SPOOL
from openmeter_plugin.instances.instance import Instance, InstanceIds, start_instance
from openmeter_plugin.instances.record import spool_record
from openmeter_plugin.log import RateLimit, configure_logging, get_logger
from openmeter_plugin.metering.lenient_json import encode_json, parse_log
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, PdkQuery
from openmeter_plugin.spool.destination import make_private
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_WAIT: Final = 2.0  # seconds for the disk; then Kong is answered all the same

_QUESTIONS: Final[Mapping[PdkQuery, Callable[[Any], Any]]] = {
    PdkQuery.APPLICATION: lambda kong: kong.ctx.shared.get("kaa_application_context"),
    PdkQuery.CAPTURES: lambda kong: kong.request.get_uri_captures(),
}

Schema = FIELDS
version = VERSION
priority = PRIORITY


class _Spooling:
    """What all instances of this process share: the spool's writer, and a delivery beside it."""

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
        """Have a delivery process run beside this one; looks again at most every few seconds.

        It ends when the pipe to it does, that is with this process, and waits while another one delivers
        this spool. Not the kernel's parent-death signal: that comes when the *thread* that forked ends.
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


_spooling: _Spooling | None = None
_spooling_lock = threading.Lock()


def _shared() -> _Spooling:
    global _spooling  # noqa: PLW0603 - kong-pdk gives plugins no place for what instances share
    with _spooling_lock:
        if _spooling is None:
            _spooling = _Spooling()
        return _spooling


class Plugin:
    """One instance of the plugin, as kong-pdk makes it: `config` is Kong's configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._instance: Instance | None = None
        try:
            shared = _shared()
            self._instance = start_instance(next(shared.ids), encode_json(config), shared.writer)
        except Exception:
            get_logger().critical(
                "spool_unusable",
                consequence="usage is lost",
                remedy="set OPENMETER_PLUGIN_SPOOL",
                exc_info=True,
            )

    def log(self, kong: Any) -> None:
        """Meter a request: Kong calls this once the client has its answer."""
        try:
            self._log(kong)
        except BaseException:
            get_logger().exception("request_not_metered")

    def _log(self, kong: Any) -> None:
        # A PDK call before anything else: until the first, kong-pdk serves nobody but us.
        log = _parsed(_data(kong.log.serialize()))
        if self._instance is None:
            return
        answers = NO_RESULTS
        spooled = spool_record(self._instance, log, answers)
        while isinstance(spooled, PdkQuery):
            answers = answers.with_result(spooled, _data(_QUESTIONS[spooled](kong)))
            spooled = spool_record(self._instance, log, answers)
        queue, record = spooled
        shared = _shared()
        shared.keep_delivering()
        written = threading.Event()
        shared.writer.append(queue, record, written)
        if not written.wait(_MAX_WAIT) and shared.unwritten_limit.passes():
            get_logger().error("spool_slow", waited_seconds=_MAX_WAIT)


def _data(answer: Any) -> Any:
    """Return the data of a PDK call, which in kong-pdk's default style comes with an error beside it."""
    return answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 2 else answer


def _parsed(log: Any) -> Any:
    if isinstance(log, str):
        return parse_log(log.encode("utf-8", "surrogateescape"))
    return parse_log(log) if isinstance(log, bytes) else log
