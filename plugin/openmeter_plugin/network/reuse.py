"""Connections that are safe to reuse: none that holds bytes of an answer that was not requested.

An answer too many, such as a doubled `204`, would otherwise count as the answer of the next request. Bytes
that arrive later make the stream readable, which httpcore checks before the next use. Bytes that were read
together with an answer are known to h11 alone, so this module reads one private attribute of httpcore.
"""

from __future__ import annotations

from typing import Any


def has_trailing_bytes(connection: object) -> bool:
    """Return whether a connection of httpcore's pool, sync or async, has read more than its answer.

    If a future httpcore hides h11's state, the result is True: then no connection is used twice.
    """
    inner: Any = connection
    while inner is not None and not hasattr(inner, "_h11_state"):
        inner = getattr(inner, "_connection", None)
    return inner is None or bool(inner._h11_state.trailing_data[0])
