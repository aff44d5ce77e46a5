"""TLS: a server with an untrusted certificate gets neither an event nor the token."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from openmeter_plugin.delivery.answers import UndeliveredError
from tests.plugin.deliveries import ids, post_once
from tests.plugin.events_server import serving


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=x"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", f"{file}.crt"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    with file.open("a") as both:
        both.write(Path(f"{file}.crt").read_text())
    return file


def post(certificate: Path, *, ssl_verify: bool) -> list[str]:
    """Post an event and return the ids that arrived."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    with serving(tls=context) as server:
        error = post_once(server.url, token="a-token", ssl_verify=ssl_verify)
        assert error is None or (isinstance(error, UndeliveredError) and server.posts == [])
        return server.taken


def test_a_server_with_an_untrusted_certificate_gets_nothing(certificate: Path) -> None:
    assert post(certificate, ssl_verify=True) == []


def test_without_verification_the_event_arrives(certificate: Path) -> None:
    assert post(certificate, ssl_verify=False) == ids(range(1, 2))


def test_a_certificate_in_ssl_cert_file_is_trusted(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    assert post(certificate, ssl_verify=True) == ids(range(1, 2))
