"""Kong's side of the MsgPack:1 protocol, for stock kong-pdk (tests/data/kong-wire/msgpack-*.jsonl)."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import msgpack

from openmeter_plugin.kong import codec
from tests.harness.recordings import Recorded


class MsgPackKong:
    """One connection of Kong to a kong-pdk server; every wait has a timeout."""

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._unpacker = msgpack.Unpacker(raw=False)
        self._sequence = 0

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(self, method: str, argument: Any) -> Any:
        """Call an RPC and return its result; raises RuntimeError with the server's error."""
        self._sequence += 1
        self._socket.sendall(msgpack.packb([0, self._sequence, method, [argument]]))
        while True:
            for message in self._unpacker:
                _, _, error, result = message
                if error:
                    raise RuntimeError(error)
                return result
            data = self._socket.recv(65536)
            assert data, "the server closed the connection"
            self._unpacker.feed(data)

    def start(self, config: dict[str, Any], name: str = "openmeter") -> int:
        """Start an instance and return its id."""
        answer = self.call("plugin.StartInstance", {"Name": name, "Config": json.dumps(config)})
        return int(answer["Id"])

    def log(self, instance: int, request: Recorded) -> list[str]:
        """Hand a request over and return the PDK functions that the plugin called."""
        asked: list[str] = []
        answer = self.call("plugin.HandleEvent", {"InstanceId": instance, "EventName": "log"})
        while answer["Data"] != "ret":
            method = answer["Data"]["Method"]
            asked.append(method)
            data = _answer(method, request)
            answer = self.call("plugin.Step", {"EventId": answer["EventId"], "Data": data})
        return asked


def _answer(method: str, request: Recorded) -> Any:
    if method == "kong.log.serialize":
        return request.log.decode()
    if method == "kong.request.get_uri_captures":
        return codec.decode_captures(request.captures or b"")
    return codec.decode_value(request.application)
