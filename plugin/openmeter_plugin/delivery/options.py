"""Options of delivery: destination overrides, network, age limit, retention, ledger pruning."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

from openmeter_plugin.network.proxies import Proxy, chosen_proxy, environment_proxy, is_nearby
from openmeter_plugin.network.tls import Tls, TlsError
from openmeter_plugin.spool.destination import is_header_value

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_TOKEN"  # noqa: S105 - the name of one, not one
"""The environment variable that overrides every destination's token, as a token file does."""

DEFAULT_RETENTION: Final = timedelta(days=1)
DEFAULT_RETENTION_BYTES: Final = 1024**3
RESEND_WINDOW: Final = timedelta(seconds=10)
"""How long a delivered segment stays whatever the retention, unless the disk runs short of space.

Kong resends a request at once, or as soon as the server is back. The second copy is recognised by the ids in
memory, and after a restart by those in the last segments: without the first copy's segment, the request
would be counted again.
"""

DEFAULT_LEDGER_DAYS: Final = 400
"""More than a year, so that the ledger can settle a dispute about a yearly invoice."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Delivered segments are removed once they are older than `age`, or together larger than `size` bytes.

    They stay for `resend_window` in any case.
    """

    age: timedelta = DEFAULT_RETENTION
    size: int = DEFAULT_RETENTION_BYTES
    resend_window: timedelta = RESEND_WINDOW


@dataclass(frozen=True, slots=True)
class Network:
    """How this host reaches the metering API: certificates, and a proxy instead of the environment's."""

    tls: Tls = field(default_factory=Tls)
    proxy: str | None = field(default=None, repr=False)

    def proxy_for(self, scheme: str, host: str, port: int | None) -> Proxy | None:
        """Return the proxy for requests to a host, None for a direct connection; raises ValueError."""
        if self.proxy and not is_nearby(host):
            return chosen_proxy(self.proxy, "--proxy", host)
        return environment_proxy(scheme, host, port)

    def check(self) -> None:
        """Check all that can be checked without a destination; raises ValueError, which names the setting."""
        for scheme in ("http", "https"):
            self.proxy_for(scheme, "metering.example", None)
        self.tls.context()


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """How to deliver a spool.

    `token_file` overrides every destination's token, and `endpoint` every destination's address. Undelivered
    events older than `max_age` become dead letters. Settled ledger lines are pruned after `ledger_days`;
    with 0 they are never pruned.
    """

    spool: Path
    retention: Retention = field(default_factory=Retention)
    token_file: Path | None = None
    max_age: timedelta | None = None
    endpoint: str | None = None
    ledger_days: int = DEFAULT_LEDGER_DAYS
    network: Network = field(default_factory=Network)

    def token(self) -> str | None:
        """Return the token that overrides all others, None without one; raises ValueError."""
        file = self.token_file
        name = f"--token-file: {file}" if file is not None else f"environment variable {TOKEN_VARIABLE}"
        try:
            token = (file.read_text() if file is not None else os.environ.get(TOKEN_VARIABLE, "")).strip()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not text") from None
        if not token and file is not None:
            raise ValueError(f"{name} is empty")
        if not is_header_value(token):
            raise ValueError(
                f"{name}: no HTTP header can hold this token: it has a line break within, or a character that"
                " is not printable ASCII"
            )
        return token or None


def in_words(error: OSError | ValueError) -> str:
    """Return what is wrong with a setting or a file, by its name and without its value."""
    if isinstance(error, TlsError) and error.settings:
        return f"{', '.join(f'--{name}' for name in error.settings).replace('_', '-')}: {error}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the spool'}: {error.strerror or error}"
    return str(error)
