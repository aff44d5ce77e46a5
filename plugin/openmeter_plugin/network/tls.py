"""Settings of TLS from files (PEM): whom to trust, and a certificate of our own."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import certifi


class TlsError(ValueError):
    """A file cannot be used; `settings` are the names of those concerned, such as ``ca_file``."""

    def __init__(self, settings: tuple[str, ...], fault: str) -> None:
        super().__init__(fault)
        self.settings = settings


@dataclass(frozen=True, slots=True)
class Tls:
    """The files: whom to trust instead of the usual authorities, and a certificate of our own.

    `client_key` is not needed if the certificate's file holds the key as well.
    """

    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def context(self, *, verify: bool = True) -> ssl.SSLContext:
        """Return the settings for TLS, which all connections share; raises TlsError."""
        files = (self.ca_file, self.client_cert, self.client_key)
        trusted = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        return _context(self, verify, trusted, tuple(map(_changed, files)))


def _changed(path: Path | None) -> int | None:
    """Return when a file was changed, so that a renewed certificate is used without a restart."""
    try:
        return path.stat().st_mtime_ns if path else None
    except OSError:
        return None  # reported when it is opened


@lru_cache(maxsize=64)
def _context(
    tls: Tls, verify: bool, trusted: tuple[str | None, str | None], _changed: tuple[int | None, ...]
) -> ssl.SSLContext:
    """Return the settings; `trusted` are a file and a folder of the environment.

    They are shared, because loading the usual authorities takes 20 ms and 0.9 MiB.
    """
    if not verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca_file is not None:
        try:
            context = ssl.create_default_context(cafile=str(tls.ca_file))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise TlsError(("ca_file",), _file_fault(tls.ca_file, error)) from None
    elif named := trusted[0]:
        try:
            context = ssl.create_default_context(cafile=named)
        except (OSError, ValueError) as error:
            fault = _file_fault(Path(named), error)
            raise TlsError((), f"environment variable SSL_CERT_FILE: {fault}") from None
    elif folder := trusted[1]:
        context = ssl.create_default_context(capath=folder)
    else:
        context = ssl.create_default_context(cafile=certifi.where())
    if tls.client_cert is not None:
        _load_certificate(context, tls.client_cert, tls.client_key)
    return context


def _load_certificate(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    _check_readable(cert, "client_cert")
    if key is not None:
        _check_readable(key, "client_key")
    try:
        context.load_cert_chain(cert, key, password=_refuse_password)
    except (OSError, ValueError) as error:
        raise TlsError(
            ("client_cert", "client_key"),
            f"{_file_fault(key or cert, error)}. They must be a certificate and its key",
        ) from None


def _refuse_password() -> str:
    """Refuse a key with a password: without this, OpenSSL would ask for it on the terminal."""
    raise ValueError("the key is encrypted; store it without a password, readable by this program only")


def _check_readable(path: Path, setting: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise TlsError((setting,), _file_fault(path, error)) from None


def _file_fault(path: Path, error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        mismatch = "KEY_VALUES_MISMATCH" in str(error)
        return f"{path} does not belong to the certificate" if mismatch else f"{path} is not in PEM format"
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror or error}"
    return f"{path}: {error}"
