"""A plugin server that does nothing with a request: the floor of what any external plugin costs Kong.

As the plugin `empty-log` it asks Kong for the serialized log and drops it, which is what every metering
plugin has to ask for. As `empty-call` it asks for nothing: what is left is the price of the call.

Run as a process of its own with the path of the socket and that of a file, in which it counts the events. The
file is mapped into memory, so that whoever watches the count does not disturb the server.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import struct
import sys
from pathlib import Path
from typing import Final, cast

import uvloop

from openmeter_plugin.kong import codec

LOG: Final = "empty-log"
CALL: Final = "empty-call"
_IDS: Final = {LOG: 1, CALL: 2}
_COUNTER: Final = struct.Struct("<Q")


def info(plugin: str) -> str:
    """Return what Kong's query command has to print for this plugin."""
    schema = {"name": plugin, "fields": [{"config": {"type": "record", "fields": []}}]}
    listed = {"Name": plugin, "Phases": ["log"], "Priority": 15, "Version": "0.0.1", "Schema": schema}
    return json.dumps({"Protocol": "ProtoBuf:1", "Plugins": [listed]})


def counted(file: Path) -> int:
    """Return how many events the server has ended."""
    return int(_COUNTER.unpack(file.read_bytes())[0])


class Counter:
    """The number of events, in a mapped file."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(_COUNTER.size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _COUNTER.size)
        self._events = 0

    def add(self) -> None:
        """Count one more."""
        self._events += 1
        _COUNTER.pack_into(self._map, 0, self._events)


class Empty(asyncio.Protocol):
    """One connection of Kong."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._data = b""
        self._sequence: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer each frame that is complete."""
        self._data += data
        while len(self._data) >= 4:
            end = 4 + int.from_bytes(self._data[:4], "little")
            if len(self._data) < end:
                return
            frame, self._data = self._data[4:end], self._data[end:]
            self._transport.write(self._answer(frame))

    def _answer(self, frame: bytes) -> bytes:
        if self._sequence is not None:
            sequence, self._sequence = self._sequence, None
            return self._end(sequence)
        call = codec.decode_call(frame)
        if isinstance(call, codec.HandleEvent):
            if call.instance_id == _IDS[CALL]:
                return self._end(call.sequence)
            self._sequence = call.sequence
            return codec.QUERY_LOG
        if isinstance(call, codec.StartInstance):
            # The benchmark without a Kong calls every server's plugin by the same name.
            instance = _IDS.get(call.name, _IDS[LOG])
            return codec.encode_instance_status(call.sequence, call.name, instance, 1)
        return codec.encode_return(call.sequence)

    def _end(self, sequence: int) -> bytes:
        self._counter.add()
        return codec.END_OF_EVENT + codec.encode_return(sequence)


async def main() -> None:
    """Serve until killed."""
    counter = Counter(Path(sys.argv[2]))
    server = await asyncio.get_running_loop().create_unix_server(lambda: Empty(counter), sys.argv[1])
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
