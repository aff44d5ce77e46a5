"""Destination descriptions: stored on disk next to each queue, so that a backlog drains after a restart.

Kong starts an instance at its first request, not when Kong itself starts. Without the description, a
backlog would wait for traffic. The token is in a separate file that only the owner can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import orjson

DEFAULT_SPOOL: Final = Path("/var/lib/openmeter-plugin/spool")
SPOOL_VARIABLE: Final = "OPENMETER_PLUGIN_SPOOL"
"""The environment variable that names the spool."""
SEGMENTS_VARIABLE: Final = "OPENMETER_PLUGIN_SEGMENTS"
"""The environment variable that names the folder of the Kong segments."""
DELIVERY_LOCK: Final = "delivery.lock"
"""The lock file of a spool, held by the one process that delivers it."""
QUARANTINE: Final = "quarantine"
"""The queue of quarantined requests; nothing in it is ever sent."""


@dataclass(frozen=True, slots=True)
class Destination:
    """An events endpoint with its credentials and batching settings. Times are in seconds."""

    id: str
    endpoint: str
    timeout: float = 10.0
    keepalive: float = 60.0
    ssl_verify: bool = True
    max_batch_size: int = 500
    max_coalescing_delay: float = 1.0
    concurrency: int = 1
    """Maximum number of POSTs in flight."""
    initial_retry_delay: float = 0.01
    max_retry_delay: float = 60.0
    token: str | None = field(default=None, repr=False)
    token_from: str = ""
    """Where the token comes from: a vault reference, or `api_token`; empty if the endpoint needs none."""
    token_unresolved: bool = False
    """A token is configured, but Kong could not resolve it from its vault: the last one stays in use."""

    def after(self, unwritten: Destination | None) -> Destination:
        """Return this description, with the token of an earlier unwritten one if its own is unresolved."""
        if unwritten is None or not self.token_unresolved or unwritten.token is None:
            return self
        return replace(self, token=unwritten.token, token_unresolved=False)


def destination_id(endpoint: str, credential: str) -> str:
    """Return the id of a destination: a hash of the endpoint and the credential's name, never its value.

    Konnect's endpoint is the same for every organisation, so the endpoint alone is not enough. The token
    itself would separate a backlog from its rotated token. `credential` is the vault reference of the
    token or, for a token written into the configuration, the id of the plugin that contains it.
    """
    return hashlib.sha256(f"{endpoint}\n{credential}".encode()).hexdigest()[:16]


def is_header_value(token: str) -> bool:
    """Return whether the token can be sent in a header; the HTTP library's own error would reveal it."""
    return token.isascii() and token.isprintable()


def queues_directory(spool: Path) -> Path:
    """Return the directory with one subdirectory for each queue."""
    return spool / "queues"


def token_file(spool: Path, destination: str) -> Path:
    """Return the file with the last token that Kong resolved for a destination; its mode is 0600."""
    return spool / "tokens" / destination


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700; raises OSError.

    Path.mkdir applies its mode to the last directory only, and Kong starts its plugin servers with umask 0.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def write_destination(spool: Path, destination: Destination, *, keep_token: bool = True) -> None:
    """Write the queue's directory, description and token file; raises OSError.

    With `keep_token` false no token is stored, because delivery gets one from its environment or a file.
    """
    directory = queues_directory(spool) / destination.id
    make_private(directory)
    description = {k: v for k, v in asdict(destination).items() if k in _DESCRIBED}
    write_atomically(directory / _DESCRIPTION, orjson.dumps(description, option=orjson.OPT_INDENT_2))
    (directory / _REDIRECT).unlink(missing_ok=True)  # Kong names this destination again
    file = token_file(spool, destination.id)
    if destination.token_unresolved and keep_token:
        return
    if destination.token is None or not keep_token:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(file, destination.token.encode())


def is_described(directory: Path) -> bool:
    """Return whether a queue's folder exists and has a description."""
    return (directory / _DESCRIPTION).exists()


def retire(spool: Path, queue: str) -> bool:
    """Remove a queue's folder with its description if nothing else is in it; returns whether that is so.

    Raises OSError.

    The token file stays: if the plugin returns while Kong cannot resolve the vault, the last token is used.
    """
    directory = queues_directory(spool) / queue
    description = directory / _DESCRIPTION
    content = description.read_bytes() if description.exists() else None
    description.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:  # a worker has just begun to write
        if content is not None and not description.exists():
            write_atomically(description, content)
        return False
    return True


def redirect_targets(spool: Path) -> set[str]:
    """Return the queues whose destination other queues use; raises OSError."""
    return {path.read_text().strip() for path in queues_directory(spool).glob(f"*/{_REDIRECT}")}


def redirect(spool: Path, queue: str, to: str | None) -> None:
    """Send a queue's events where those of another go, with its token; with None, no longer. Raises OSError.

    It lasts until Kong's configuration names the queue's own destination again.
    """
    file = queues_directory(spool) / queue / _REDIRECT
    if to is None:
        file.unlink(missing_ok=True)
    else:
        write_atomically(file, to.encode())


def read_destination(spool: Path, queue: str) -> Destination | None:
    """Return a queue's destination with its token, or None if it has no description.

    It is that of another queue if an operator has redirected this one. Raises ValueError or OSError if there
    is a description but it cannot be read.
    """
    found = _described(spool, _redirected(spool, queue))
    return None if found is None else replace(found, id=queue)


def _redirected(spool: Path, queue: str) -> str:
    """Return the queue whose destination holds, after all redirects; raises ValueError for a circle."""
    seen = [queue]
    while True:
        try:
            target = (queues_directory(spool) / seen[-1] / _REDIRECT).read_text().strip()
        except FileNotFoundError:
            return seen[-1]
        if target in seen or Path(target).name != target:
            raise ValueError(f"the redirect of queue {queue} leads nowhere: {' to '.join([*seen, target])}")
        seen.append(target)


def _described(spool: Path, queue: str) -> Destination | None:
    try:
        raw = (queues_directory(spool) / queue / _DESCRIPTION).read_bytes()
    except FileNotFoundError:
        return None
    description = orjson.loads(raw)
    if not isinstance(description, dict):
        raise ValueError(f"the description of queue {queue} is not an object")  # noqa: TRY004 - bad content
    known = {name: value for name, value in description.items() if name in _DESCRIBED}
    try:
        token: str | None = token_file(spool, queue).read_text().strip()
    except FileNotFoundError:
        token = None
    for name, value in known.items():
        if not _has_type_of(value, getattr(_EXAMPLE, name)):
            raise ValueError(f"the description of queue {queue}: {name} has the wrong type")
        low, high = _RANGES.get(name, (0, float("inf")))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"the description of queue {queue}: {name} is {value}, not {low} to {high}")
    try:
        return Destination(**known, token=token)
    except TypeError:
        raise ValueError(f"the description of queue {queue} is incomplete") from None


_REDIRECT: Final = "redirect"
_DESCRIPTION: Final = "destination.json"
_DESCRIBED: Final = frozenset(Destination.__dataclass_fields__) - {"token", "token_unresolved"}
_EXAMPLE: Final = Destination("", "")
_RANGES: Final = {
    # As Kong checks them. Beyond these, delivery would spin or stop.
    "timeout": (0.000_001, 1e9),
    "keepalive": (0, 1e6),
    "max_batch_size": (1, 1_000_000),
    "max_coalescing_delay": (0, 3600),
    "concurrency": (1, 1000),
    "initial_retry_delay": (0.001, 1_000_000),
    "max_retry_delay": (0.001, 1_000_000),
}


def _has_type_of(value: object, example: object) -> bool:
    """Return whether a value has an example's type; an int also passes for a float."""
    return type(value) is type(example) or (type(example) is float and type(value) is int)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically, with mode 0600: a reader finds the old content or the new, never half of it.

    A file that already has this content is not touched: each reload of Kong describes every destination.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
