"""An events endpoint that costs next to nothing: it reads, counts and answers 204.

Run as a process of its own; prints its URL. `GET /count` tells how many events came; with `--ids` as its
argument, `GET /ids` lists the ids of the requests that they are of, each as often as it came.
"""

from __future__ import annotations

import re
import socket
import sys
import threading

_ID = re.compile(rb'"id":"([0-9a-f]{32})"')
_MARKS = (b'"specversion"', b'"started_at"')  # of a CloudEvent, of a serialized log


class Count:
    """Events received, over all connections."""

    def __init__(self, *, with_ids: bool = False) -> None:
        self.events = 0
        self.ids: list[bytes] | None = [] if with_ids else None
        self.lock = threading.Lock()


def serve(connection: socket.socket, count: Count) -> None:
    """Answer the requests of one connection."""
    buffer = bytearray()
    with connection:
        while True:
            while (end := buffer.find(b"\r\n\r\n")) < 0:
                data = connection.recv(1 << 20)
                if not data:
                    return
                buffer += data
            head = bytes(buffer[:end])
            del buffer[: end + 4]
            length = _content_length(head)
            while len(buffer) < length:
                data = connection.recv(1 << 20)
                if not data:
                    return
                buffer += data
            body = bytes(buffer[:length])
            del buffer[:length]
            connection.sendall(_answer(head, body, count))


def _answer(head: bytes, body: bytes, count: Count) -> bytes:
    if head.startswith(b"GET"):
        text = b"%d" % count.events if not head.startswith(b"GET /ids") else b"\n".join(count.ids or ())
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text)
    with count.lock:
        count.events += max(body.count(mark) for mark in _MARKS)
        if count.ids is not None:
            count.ids += _ID.findall(body)
    return b"HTTP/1.1 204 No Content\r\n\r\n"


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def main() -> None:
    """Serve until killed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    count = Count(with_ids="--ids" in sys.argv[1:])
    sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, count), daemon=True).start()


if __name__ == "__main__":
    main()
