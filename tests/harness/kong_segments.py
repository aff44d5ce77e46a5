"""A stand-in for the plugin's Lua half in Kong: writes Kong segments, counters and configurations."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
import zlib
from pathlib import Path
from typing import Any

import orjson

from openmeter_plugin.segments.line_format import (
    _COUNTERS,
    _LOST_MAGIC,
    _LOST_MAGIC_AT,
    FORMAT,
    INSTANCE_FORMAT,
    LOST_CAUSES,
    LOST_SIZE,
    VERSION,
    Counters,
)

ENDPOINT = "http://127.0.0.1:9/api/v1/events"


def encode_line(payload: bytes) -> bytes:
    """Return the line of a payload."""
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def encode_head(**members: Any) -> bytes:
    """Return the first line of a segment."""
    return encode_line(orjson.dumps({"format": FORMAT, "version": VERSION, **members}))


def encode_instance(name: str, created: int, config: bytes) -> bytes:
    """Return the file of an instance."""
    members = {"format": INSTANCE_FORMAT, "version": VERSION, "id": name, "created": created}
    return encode_line(orjson.dumps(members)[:-1] + b',"config":' + config + b"}")


def encode_lost(counts: Counters) -> bytes:
    """Return the file of a worker's counts."""
    values = [counts.get(cause, 0) for cause in LOST_CAUSES]
    page = bytearray(LOST_SIZE)
    _COUNTERS.pack_into(page, 0, *values, *[0] * (16 - len(values)))
    page[_LOST_MAGIC_AT : _LOST_MAGIC_AT + len(_LOST_MAGIC)] = _LOST_MAGIC
    return bytes(page)


def configuration(endpoint: str = ENDPOINT, **members: Any) -> bytes:
    """Return a configuration as Kong's half writes it."""
    config = {"ingest_endpoint": endpoint, "api_token": "token-1", "__plugin_id": "plugin-1", **members}
    return orjson.dumps(config, option=orjson.OPT_SORT_KEYS)


def instance_id(config: bytes) -> str:
    """Return the id that Kong's half gives to a configuration."""
    return hashlib.sha256(config).hexdigest()[:32]


def log(request_id: str, **members: Any) -> dict[str, Any]:
    """Return the log of a consumer's request."""
    return {
        "request": {"id": request_id, "method": "GET", "size": 100},
        "response": {"status": 200, "size": 300},
        "latencies": {"request": 3, "proxy": 2},
        "started_at": 1795800000000,
        "consumer": {"id": "c-1", "username": "alice"},
        "source": "upstream",
        **members,
    }


def request_line(instance: str, request_id: str, *, x: dict[str, Any] | None = None, **members: Any) -> bytes:
    """Return the line of a request."""
    payload: dict[str, Any] = {"i": instance, "log": log(request_id, **members)}
    return encode_line(orjson.dumps(payload if x is None else payload | {"x": x}))


class Worker:
    """An nginx worker that writes to a folder."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self.name = name or f"{os.getpid()}-{time.time_ns() // 1_000_000}-{secrets.token_hex(4)}"
        self._number = 0
        self._descriptor: int | None = None
        self._lost: int | None = None
        self.counted = 0
        """The lost requests in its counters."""
        (folder / "instances").mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """The segment that it writes."""
        return self.folder / f"{self.name}-{self._number:06d}.segment"

    def configure(self, config: bytes, *, at: float | None = None) -> str:
        """Write a configuration and return its id."""
        name = instance_id(config)
        path = self.folder / "instances" / f"{name}.json"
        temporary = path.with_name(f"{path.name}.{self.name}.tmp")
        created = time.time() if at is None else at
        temporary.write_bytes(encode_instance(name, int(created * 1000), config))
        temporary.rename(path)
        return name

    def write(self, *lines: bytes) -> None:
        """Append lines, each with one write(2)."""
        for line in lines:
            assert os.write(self._open(), line) == len(line)

    def move_on(self) -> None:
        """Leave the segment; the next line begins another."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def lose(self, **counts: int) -> None:
        """Set the counters of lost requests."""
        path = self.folder / f"{self.name}.lost"
        if self._lost is None:
            temporary = path.with_name(f"{path.name}.{self.name}.tmp")
            self._lost = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            fcntl.flock(self._lost, fcntl.LOCK_EX)
            os.pwrite(self._lost, encode_lost({}), 0)
            temporary.rename(path)
        os.pwrite(self._lost, encode_lost(counts), 0)
        self.counted = sum(counts.values())

    def end(self) -> None:
        """Let go of all files, as the kernel does for a killed process."""
        self.move_on()
        if self._lost is not None:
            os.close(self._lost)
            self._lost = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._number += 1
            temporary = self.path.with_name(f"{self.path.name}.{self.name}.tmp")
            self._descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640
            )
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, encode_head(worker=self.name, kong="3.9.1", created=0))
            temporary.rename(self.path)
        return self._descriptor


def write_segment(folder: Path, content: bytes, name: str = "") -> Path:
    """Write a segment that its worker has left, with this content."""
    worker = Worker(folder, name)
    path = folder / f"{worker.name}-000001.segment"
    path.write_bytes(content)
    return path
