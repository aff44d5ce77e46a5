"""Proxies: which posts pass one, and what is said about settings that cannot work."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import structlog

from openmeter_plugin.delivery.options import Network
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.harness.sockets import talking
from tests.plugin.deliveries import delivering, ids, post_once, record, spooled
from tests.plugin.events_server import serving
from tests.plugin.spools import destination


def as_proxy(seen: list[bytes]) -> object:
    """Answer any request as a proxy that has no way to its target."""

    def converse(connection: socket.socket) -> None:
        seen.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    return converse


def test_posts_to_loopback_never_pass_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with talking(as_proxy(seen)) as proxy, serving() as server:  # type: ignore[arg-type]
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert post_once(server.url, token="sk-1") is None
        assert post_once(server.url, token="sk-1", network=Network(proxy=proxy.url)) is None
    assert seen == []


@pytest.mark.parametrize("by_option", [False, True])
def test_other_posts_pass_the_proxy(monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
    seen: list[bytes] = []
    with talking(as_proxy(seen)) as proxy:  # type: ignore[arg-type]
        if not by_option:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
        network = Network(proxy=proxy.url.replace("//", "//me:pw@")) if by_option else None
        error = post_once("http://metering.example/events", network=network)
        assert "502" in str(error)
        assert post_once("https://metering.example/events", network=network) is not None
    assert seen[0].startswith(b"POST http://metering.example/events HTTP/1.1\r\n")
    assert (b"proxy-authorization: basic" in seen[0].lower()) == by_option
    assert [head.split()[0] for head in seen[1:]] == ([b"CONNECT"] if by_option else [])


def test_no_proxy_takes_ipv6_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "::1,fd00::/8,10.0.0.0/8")
    network = Network()
    network.check()
    assert network.proxy_for("http", "fd00::7", None) is None
    assert network.proxy_for("http", "10.1.2.3", None) is None
    assert network.proxy_for("http", "11.1.2.3", None) is not None


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"HTTPS_PROXY": "socks5://proxy:1080"}, "HTTPS_PROXY: a SOCKS proxy needs the package socksio"),
        ({"ALL_PROXY": "nonsense://proxy"}, "ALL_PROXY: a proxy is a URL"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "a b"}, "NO_PROXY: 'a b' is neither"),
    ],
)
def test_proxy_settings_that_cannot_work_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=named):
        Network().check()


def test_a_delivery_that_cannot_start_says_so_and_goes_on_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        monkeypatch.setenv("HTTP_PROXY", "http://p:1")
        monkeypatch.setenv("NO_PROXY", "a b")
        monkeypatch.setattr("openmeter_plugin.network.proxies.is_nearby", lambda _: False)
        write_destination(tmp_path, destination(server.url, token="sk-1"))
        spooled(tmp_path, [record(1)])
        with structlog.testing.capture_logs() as lines, delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
            assert server.posts == []
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            eventually(lambda: server.taken == ids(range(1, 2)))
    held = next(line for line in lines if line["event"] == "delivery_held")
    assert held["hold"] == "settings"
    assert "NO_PROXY" in held["reason"]
