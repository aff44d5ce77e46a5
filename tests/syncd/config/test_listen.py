from __future__ import annotations

import pytest

from syncd.config.types import Listen


@pytest.mark.parametrize(
    ("text", "url", "loopback"),
    [
        ("127.0.0.1:8890", "http://127.0.0.1:8890", True),
        ("localhost:1", "http://localhost:1", True),
        ("[::1]:8890", "http://[::1]:8890", True),
        ("0.0.0.0:8890", "http://127.0.0.1:8890", False),
        ("[::]:8890", "http://[::1]:8890", False),
        ("10.0.0.7:0", "http://10.0.0.7:0", False),
        ("syncd.example:8890", "http://syncd.example:8890", False),
    ],
)
def test_an_address_is_parsed(text: str, url: str, loopback: bool) -> None:
    address = Listen.parse(text)
    assert isinstance(address, Listen)
    assert (address.url, address.is_loopback) == (url, loopback)


@pytest.mark.parametrize("text", ["", "8890", ":8890", "host:", "host:http", "host:65536", "host:-1"])
def test_a_text_that_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Listen.parse(text)
