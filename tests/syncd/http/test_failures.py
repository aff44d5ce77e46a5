"""What the errors of requests say, and which are tried again."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.network.tls import Tls
from syncd.core.errors import ConfigError, RefusedError, SyncdError, UnauthorizedError, UnreachableError
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint, check_endpoint, variable_of
from syncd.http.retry import MAX_RETRY_AFTER, Pace, Retry, http_date, retry_after
from tests.harness.ports import free_port
from tests.harness.sockets import Authority, read_request, reply, talking
from tests.syncd.servers import Answer, Asked, serving

TOKEN = "sk-t0ken/+=&\"<>'"


def endpoint(url: str, **more: object) -> Endpoint:
    given: dict[str, object] = {"token": TOKEN, "timeout": 5.0, **more}
    return Endpoint("metering", url, "metering.token", "read and write", **given)  # type: ignore[arg-type]


def failure(at: Endpoint, waits: list[float] | None = None) -> SyncdError:
    sleep = [] if waits is None else waits
    retry = Retry(attempts=3, sleep=sleep.append, pace=Pace())
    with pytest.raises(SyncdError) as caught, ApiClient(at, retry) as api:
        api.get("/x")
    assert TOKEN not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("tls"))


def answering(talk: socket.socket) -> None:
    while read_request(talk):
        talk.sendall(reply())


def refusing(talk: socket.socket) -> None:
    talk.recv(65536)
    talk.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


# Tried again or not


@pytest.mark.parametrize("host", ["nowhere.invalid", f"{'a' * 70}.example"])
def test_an_unknown_host_is_told_at_once_and_by_its_setting(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host.endswith(".invalid"):  # a machine without a resolver says "try again"
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    waits: list[float] = []
    error = failure(endpoint(f"http://{host}"), waits)
    assert f"the host name {host} is unknown. Is metering.url right?" in str(error)
    assert "did not answer" not in str(error)
    assert waits == []


def test_a_lookup_that_failed_for_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", busy)
    error = failure(endpoint("http://nowhere.invalid"))
    assert "Temporary failure in name resolution (tried 3 times)" in str(error)


def test_a_connection_refused_is_tried_again_and_did_not_answer() -> None:
    waits: list[float] = []
    error = failure(endpoint(f"http://127.0.0.1:{free_port()}"), waits)
    assert "did not answer GET /x: Connection refused (tried 3 times)" in str(error)
    assert len(waits) == 2


def test_a_certificate_of_a_private_authority_is_told_at_once_with_the_setting_to_use(
    authority: Authority,
) -> None:
    waits: list[float] = []
    with talking(answering, authority.server()) as there:
        error = failure(endpoint(there.url), waits)
    assert "its certificate is not valid: unable to get local issuer certificate" in str(error)
    assert "set metering.ca_file to that authority's certificate" in str(error)
    assert waits == []
    assert there.connections == 1


def test_a_certificate_for_another_host_says_so(authority: Authority) -> None:
    with talking(answering, authority.server()) as there:
        at = endpoint(there.url.replace("127.0.0.1", "localhost"), tls=Tls(authority.ca))
        error = failure(at)
    assert "Use the name in the certificate in metering.url" in str(error)


def test_a_private_authority_and_a_client_certificate_are_used(authority: Authority) -> None:
    tls = Tls(authority.ca, authority.certificate, authority.key)
    with talking(answering, authority.server(wants_client=True)) as there:
        check_endpoint(at := endpoint(there.url, tls=tls))
        with ApiClient(at, Retry(attempts=1)) as api:
            assert api.get("/x") == {}


def test_a_missing_client_certificate_is_told_at_once_with_the_settings_to_use(authority: Authority) -> None:
    waits: list[float] = []
    with talking(answering, authority.server(wants_client=True)) as there:
        error = failure(endpoint(there.url, tls=Tls(authority.ca)), waits)
    assert "Does it want a client certificate (client_cert, client_key)?" in str(error)
    assert waits == []


def test_https_to_a_port_of_http_is_told_at_once() -> None:
    waits: list[float] = []
    with talking(refusing) as there:
        error = failure(endpoint(there.url.replace("http:", "https:")), waits)
    assert "the server does not speak TLS on this port" in str(error)
    assert waits == []


@pytest.mark.parametrize("token", ["sk\n", "sk\r\nX: y", "skß", "sk\x00", " sk"])
def test_a_token_that_no_header_can_hold_is_refused_by_its_setting_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ApiClient(endpoint("http://127.0.0.1:1", token=token), Retry())
    assert "metering.token (environment: SYNCD_METERING__TOKEN)" in str(caught.value)
    assert token.strip() not in str(caught.value).replace("SYNCD_METERING__TOKEN", "")


def test_an_answer_of_500_answered() -> None:
    with serving(lambda _: Answer({"detail": "broken"}, 500)) as server:
        error = failure(endpoint(server.url))
    assert isinstance(error, UnreachableError)
    assert "answered GET /x with HTTP 500 broken (tried 3 times)" in str(error)
    assert "did not answer" not in str(error)
    assert error.status == 500


# What the server says


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"title": "Bad Request", "detail": "validation error: key is required"}, "key is required"),
        ({"message": "no such\n\x1b[31mthing\u202e"}, "no such [31mthing"),
        (
            {
                "title": "Bad Request",
                "extensions": {
                    "validationErrors": [
                        {"field": "$.labels", "message": "label value must be in valid format"},
                        {"field": "$.labels", "message": "label value must be in valid format"},
                        {"message": "another"},
                    ]
                },
            },
            "$.labels: label value must be in valid format; another",
        ),
        (
            {
                "title": "Bad Request",
                "detail": "Bad Request",
                "invalid_parameters": [{"field": "page[size]", "reason": "must be between 1 and 100"}],
            },
            "page[size]: must be between 1 and 100",
        ),
        (
            {"detail": 'Error at "/name": too long\nSchema:\n  {\n "x": 1}\n\nValue:\n  "a"\n'},
            'Error at "/name": too long',
        ),
        ({"title": "Bad Request"}, "Bad Request"),
        ({"title": 7, "extensions": {"validationErrors": [3, {"message": 4}]}}, ""),
        ({"detail": {"a": 1}, "invalid_parameters": "x"}, ""),
        ([], ""),
    ],
)
def test_the_reason_of_a_refusal_is_told_in_one_line(body: object, reason: str) -> None:
    with serving(lambda _: Answer(body, 400)) as server:
        error = failure(endpoint(server.url))
    assert isinstance(error, RefusedError)
    assert error.detail.endswith(reason)
    assert "Schema" not in error.detail
    assert str(error).endswith(f"refused GET /x: HTTP 400 {error.detail}".rstrip())


@pytest.mark.parametrize("path", ["/api/v1", ""])
@pytest.mark.parametrize("body", [b"<html>404", json.dumps({"title": "Not Found", "status": 404}).encode()])
def test_a_404_of_the_path_asks_for_the_url(path: str, body: bytes) -> None:
    with serving(lambda _: Answer(body, 404)) as server:
        error = str(failure(endpoint(server.url + path)))
    assert "Is metering.url right?" in error
    assert ("try it without /api/v1" in error) == bool(path)


def test_a_404_of_an_entity_does_not_ask_for_the_url() -> None:
    with serving(lambda _: Answer({"detail": "customer with id 7 not found"}, 404)) as server:
        assert "Is metering.url right" not in str(failure(endpoint(server.url)))


@pytest.mark.parametrize(
    ("status", "token", "words"),
    [
        (401, None, "no token is set in"),
        (401, TOKEN, "is wrong or expired"),
        (403, None, "access without one lacks permissions"),
        (403, TOKEN, "lacks permissions (reader may not)"),
    ],
)
def test_a_refused_token_is_told_once_with_its_setting_and_variable(
    status: int, token: str | None, words: str
) -> None:
    with serving(lambda _: Answer({"message": "reader may not"}, status)) as server:
        error = failure(endpoint(server.url, token=token))
    assert isinstance(error, UnauthorizedError)
    assert words in str(error)
    assert str(error).count("metering.token") == 1
    assert "SYNCD_METERING__TOKEN" in str(error)


def test_the_variable_of_a_setting_in_a_list_has_its_position() -> None:
    assert variable_of("sources[0].token") == "SYNCD_SOURCES__0__TOKEN"


@pytest.mark.parametrize("spell", [str, quote, lambda text: json.dumps(text)[1:-1]])
def test_a_token_that_a_server_repeats_is_masked(spell: object) -> None:
    assert callable(spell)
    answers = iter([Answer({"detail": f"bad {spell(TOKEN)}!"}, 400)])
    with serving(lambda _: next(answers)) as server:
        assert str(failure(endpoint(server.url))).endswith("bad ***!")


def test_a_token_in_an_answer_that_is_not_http_is_masked() -> None:
    def echo(talk: socket.socket) -> None:
        talk.sendall(b"garbage " + read_request(talk).split(b"Authorization: ")[1][:40] + b"\r\n\r\n")

    with talking(echo) as there:
        error = failure(endpoint(there.url))
    assert "something that is not HTTP" in str(error)
    assert "sk-t0ken" not in str(error)


# Retry-After


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0),
        ("1e400", MAX_RETRY_AFTER),
        ("-1e400", 0.0),
        ("-5", 0.0),
        ("nan", None),
        ("9" * 5000, MAX_RETRY_AFTER),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_any_retry_after_is_survived_and_bounded(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds


@given(st.one_of(st.text(), st.from_regex(r"\w{3}, \d{1,30} Jan \d{1,30} \d\d:\d\d:\d\d ([+-]\d{4,9}|GMT)")))
def test_no_header_breaks_the_reading_of_dates_and_waits(header: str) -> None:
    found = retry_after(header)
    assert found is None or 0 <= found <= MAX_RETRY_AFTER
    moment = http_date(header)
    assert moment is None or moment.tzinfo is UTC
    assert moment is None or isinstance(moment - datetime.now(UTC), object)


def test_a_retry_after_a_year_away_is_obeyed_for_a_minute() -> None:
    waits: list[float] = []
    limited = Answer({}, 429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"})
    with serving(lambda _: limited) as server:
        failure(endpoint(server.url), waits)
    assert all(60 <= wait < 61.1 for wait in map(round, waits))


def test_a_429_to_one_client_slows_every_client_of_that_api_and_of_no_other() -> None:
    limited = iter([Answer({}, 429, {"Retry-After": "7"})])

    def answer(_asked: Asked) -> Answer:
        return next(limited, Answer({}))

    waits: list[float] = []
    with serving(answer) as server, serving(lambda _: Answer({})) as other:
        with ApiClient(endpoint(server.url), Retry(attempts=1)) as api, pytest.raises(UnreachableError):
            api.get("/x")
        for url in (other.url, server.url):
            with ApiClient(endpoint(url), Retry(attempts=1, sleep=waits.append)) as api:
                api.get("/x")
    assert [round(wait) for wait in waits] == [7]


# Proxies


class ForwardProxy:
    """`seen` are the first lines and headers of requests that reached it."""

    def __init__(self, status: bytes = b"200 OK") -> None:
        self.seen: list[bytes] = []
        self._status = status

    def __call__(self, talk: socket.socket) -> None:
        while head := read_request(talk):
            self.seen.append(head)
            talk.sendall(reply(status=self._status))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_the_environments_proxy_is_used_for_others_and_never_for_this_machine(
    environment: pytest.MonkeyPatch,
) -> None:
    proxy = ForwardProxy()
    with talking(proxy) as there, serving(lambda _: Answer({})) as local:
        environment.setenv("HTTP_PROXY", there.url)
        for url in ("http://metering.example", local.url, local.url.replace("127.0.0.1", "localhost")):
            with ApiClient(endpoint(url), Retry(attempts=1)) as api:
                assert api.get("/x") == {}
    assert [head.split(b"\r\n")[0] for head in proxy.seen] == [b"GET http://metering.example/x HTTP/1.1"]
    assert len(local.asked) == 2


def test_the_proxy_of_a_setting_is_used_with_its_password_which_no_message_shows(
    environment: pytest.MonkeyPatch,
) -> None:
    proxy = ForwardProxy(b"407 Proxy Authentication Required")
    with talking(proxy) as there:
        environment.setenv("HTTP_PROXY", "http://nowhere.invalid")
        url = there.url.replace("//", "//me:s3cret-pass@")
        error = str(failure(endpoint("http://metering.example", proxy=url)))
        tunnel = str(failure(endpoint("https://metering.example", proxy=url)))
    assert b"Proxy-Authorization: Basic bWU6czNjcmV0LXBhc3M=" in proxy.seen[0]
    assert proxy.seen[1].startswith(b"CONNECT metering.example:443 ")
    for text in (error, tunnel):
        assert "put them into metering.proxy" in text
        assert "s3cret-pass" not in text


@pytest.mark.parametrize(
    ("exempt", "host", "direct"),
    [
        ("*", "metering.example", True),
        ("example", "metering.example", True),
        (".example", "metering.example", True),
        ("ring.example", "metering.example", False),
        ("metering.example:80", "metering.example", True),
        ("metering.example:81", "metering.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("::1,fd00::/8", "[fd00::7]", True),
        ("::1,fd00::/8", "metering.example", False),
        ("http://metering.example", "metering.example", True),
        ("", "169.254.7.7", True),
        ("", "[fe80::1]", True),
        ("", "[::ffff:127.0.0.1]", True),
        ("", "127.9.9.9", True),
        ("", "metering.example", False),
    ],
)
def test_no_proxy_names_hosts_addresses_and_networks(
    exempt: str, host: str, direct: bool, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("HTTP_PROXY", "proxy:3128")
    environment.setenv("NO_PROXY", exempt)
    found = endpoint(f"http://{host}").resolved_proxy()
    assert (found is None) == direct
    assert found is None or found.url == "http://proxy:3128"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HTTP_PROXY": "socks5://proxy:1080"}, "HTTP_PROXY: a SOCKS proxy needs the package socksio"),
        ({"ALL_PROXY": "ftp://proxy"}, "ALL_PROXY: a proxy is a URL such as http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:port"}, "HTTP_PROXY: a proxy is a URL"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "10.0.0.0/99"}, "NO_PROXY: '10.0.0.0/99' is neither"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "a b"}, "NO_PROXY: 'a b' is neither"),
    ],
)
def test_a_proxy_of_the_environment_that_cannot_be_used_is_named_at_start(
    variables: dict[str, str], words: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="environment variable") as caught:
        check_endpoint(endpoint("http://metering.example"))
    assert words in str(caught.value)


# Files


def test_files_for_tls_that_cannot_be_used_are_named_at_start(authority: Authority, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    other = Authority.made(tmp_path)
    gone = tmp_path / "gone.pem"
    cases = [
        (Tls(gone), "metering.ca_file: cannot read"),
        (Tls(garbage), "metering.ca_file: "),
        (Tls(client_key=other.key), "metering.client_key needs metering.client_cert"),
        (Tls(client_cert=gone, client_key=other.key), "metering.client_cert: cannot read"),
        (Tls(client_cert=other.certificate, client_key=gone), "metering.client_key: cannot read"),
        (Tls(client_cert=other.certificate, client_key=authority.key), "does not belong to the certificate"),
        (Tls(client_cert=garbage), "is not in PEM format"),
    ]
    for tls, words in cases:
        with pytest.raises(ConfigError) as caught:
            check_endpoint(endpoint("https://metering.example", tls=tls))
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"metering\.ca_file needs TLS"):
        check_endpoint(endpoint("http://metering.example", tls=Tls(authority.ca)))


def test_a_renewed_authority_is_read_again(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.ca.read_bytes())
    first = Tls(path).context()
    assert Tls(path).context() is first
    path.write_bytes(authority.ca.read_bytes() + b"\n")
    assert isinstance(second := Tls(path).context(), ssl.SSLContext)
    assert second is not first


def test_no_thread_is_left_behind_by_requests() -> None:
    with serving(lambda _: Answer({})) as server, ApiClient(endpoint(server.url), Retry()) as api:
        for _ in range(3):
            api.get("/x")
        assert not [found for found in threading.enumerate() if found.name == "syncd-connect"]
