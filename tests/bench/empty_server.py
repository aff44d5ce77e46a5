"""A plugin server that takes the log of each request and does nothing with it.

What a gateway makes with it is the most that any external plugin of this protocol can leave it: the rest
is what Kong itself does for each call. Run as a process of its own; its argument is the socket's path.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

from openmeter_plugin.kong import codec


class Empty(asyncio.Protocol):
    """One connection of Kong."""

    def __init__(self) -> None:
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
            return codec.END_OF_EVENT + codec.encode_return(sequence)
        call = codec.decode_call(frame)
        if isinstance(call, codec.HandleEvent):
            self._sequence = call.sequence
            return codec.QUERY_LOG
        if isinstance(call, codec.StartInstance):
            return codec.encode_instance_status(call.sequence, call.name, 1, 1)
        return codec.encode_return(call.sequence)


async def main() -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_unix_server(Empty, sys.argv[1])
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
