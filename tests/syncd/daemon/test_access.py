"""Host and Origin checks against what a web page could make its visitor's browser send."""

from __future__ import annotations

import pytest

from syncd.daemon.access import is_cross_origin, is_loopback

OWN = {"host": "syncd.example.com"}


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8890", "LOCALHOST", "127.0.0.1:8890", "127.9.9.9", "[::1]", "[::1]:8890"]
)
def test_loopback_names_and_addresses_are_recognized(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example:8890",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[::1",
        "evil.example@localhost.x",
        "0.0.0.0",
    ],
)
def test_other_names_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "headers",
    [
        OWN,
        OWN | {"origin": "https://syncd.example.com"},
        OWN | {"sec-fetch-site": "same-origin"},
        OWN | {"sec-fetch-site": "none"},
        # A proxy that changes Host: the browser's verdict counts.
        {"host": "syncd:8890", "origin": "https://syncd.example.com", "sec-fetch-site": "same-origin"},
    ],
)
def test_own_pages_and_programs_are_not_cross_origin(headers: dict[str, str]) -> None:
    assert not is_cross_origin(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "https://syncd.example.com.evil.example"},
        {"origin": "https://syncd.example.com:8443"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "https://syncd.example.com"},
    ],
)
def test_pages_of_other_origins_are_cross_origin(headers: dict[str, str]) -> None:
    assert is_cross_origin(OWN | headers)


def test_a_request_without_a_host_has_no_own_origin() -> None:
    assert is_cross_origin({"origin": "null"})


def test_the_public_url_is_an_own_origin_too() -> None:
    proxied = {"host": "syncd:8890", "origin": "https://syncd.example.com"}
    assert is_cross_origin(proxied)
    assert not is_cross_origin(proxied, "https://syncd.example.com")
    assert is_cross_origin(proxied, "https://other.example.com")
