"""Where a queue's events go: described on disk beside the queue, so that a backlog drains after a restart.

Kong starts an instance at its first request, not when Kong starts; without the description a backlog
would wait for traffic. The token stands apart, readable by the owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import orjson

DELIVERY_LOCK: Final = "delivery.lock"
"""The file in a spool that the one process that delivers it holds locked."""
QUARANTINE: Final = "quarantine"
"""The queue of records whose configuration could not be used; nothing is sent from it."""


@dataclass(frozen=True, slots=True)
class Destination:
    """An events endpoint with the way to talk to it. Times in seconds."""

    id: str
    endpoint: str
    timeout: float = 10.0
    keepalive: float = 60.0
    ssl_verify: bool = True
    max_batch_size: int = 500
    max_coalescing_delay: float = 1.0
    concurrency: int = 1
    """POSTs that may be under way at once."""
    initial_retry_delay: float = 0.01
    max_retry_delay: float = 60.0
    token: str | None = field(default=None, repr=False)
    token_unresolved: bool = False
    """There should be a token, but Kong's vault has not given it: the last one goes on being used."""

    def after(self, unwritten: Destination | None) -> Destination:
        """Return this description where an earlier one is not written yet, whose token may be the last."""
        if unwritten is None or not self.token_unresolved or unwritten.token is None:
            return self
        return replace(self, token=unwritten.token, token_unresolved=False)


def destination_id(endpoint: str, credential: str) -> str:
    """Return the id of a destination: the endpoint and what names the credential, never the credential.

    Konnect's endpoint is the same for every organisation, so the endpoint alone is not enough; the token
    itself would part a rotated token from its backlog. `credential` is the vault reference of the token
    or, for a token written into the configuration, the id of the plugin that it is written in.
    """
    return hashlib.sha256(f"{endpoint}\n{credential}".encode()).hexdigest()[:16]


def is_header_value(token: str) -> bool:
    """Tell whether the token can be sent in a header; the HTTP library's own error would show it."""
    return token.isascii() and token.isprintable()


def queues_directory(spool: Path) -> Path:
    """Return the directory that holds a directory for each queue."""
    return spool / "queues"


def token_file(spool: Path, destination: str) -> Path:
    """Return the file with the last token that Kong resolved for a destination, mode 0600."""
    return spool / "tokens" / destination


def make_private(directory: Path) -> None:
    """Make a directory, and those above it that are missing, for the owner only; raises OSError.

    Path.mkdir gives its mode to the last of them alone, and Kong starts its plugin servers with no umask.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def write_destination(spool: Path, destination: Destination, *, keep_token: bool = True) -> None:
    """Make the queue's directory, its description and its token file; raises OSError.

    Without `keep_token` no token is kept: delivery has one from elsewhere.
    """
    directory = queues_directory(spool) / destination.id
    make_private(directory)
    description = {k: v for k, v in asdict(destination).items() if k in _DESCRIBED}
    write_atomically(directory / "destination.json", orjson.dumps(description, option=orjson.OPT_INDENT_2))
    file = token_file(spool, destination.id)
    if destination.token_unresolved and keep_token:
        return
    if destination.token is None or not keep_token:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(file, destination.token.encode())


def read_destination(spool: Path, queue: str) -> Destination | None:
    """Return a queue's destination with its token, or None where there is nobody to send to.

    Raises ValueError or OSError where the description is there but cannot be read.
    """
    try:
        raw = (queues_directory(spool) / queue / "destination.json").read_bytes()
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
        if not _fits(value, getattr(_EXAMPLE, name)):
            raise ValueError(f"the description of queue {queue}: {name} cannot be used")
    try:
        return Destination(**known, token=token)
    except TypeError:
        raise ValueError(f"the description of queue {queue} is not complete") from None


_DESCRIBED: Final = frozenset(Destination.__dataclass_fields__) - {"token", "token_unresolved"}


_EXAMPLE: Final = Destination("", "")


def _fits(value: object, example: object) -> bool:
    """Tell whether a value is of an example's type; where that is a fraction, a whole number will do."""
    return type(value) is type(example) or (type(example) is float and type(value) is int)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, mode 0600: a reader finds the old content or the new, never half of it.

    A file that has this content already is left alone: every reload of Kong describes every destination.
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
