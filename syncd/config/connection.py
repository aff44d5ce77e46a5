"""Settings of the connection to an HTTP API: whom to trust, a certificate of our own, a proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import SecretStr

from openmeter_plugin.network.tls import Tls
from syncd.config.types import Section
from syncd.http.endpoint import Endpoint, check_endpoint


class ConnectionConfig(Section):
    """Settings that all HTTP APIs share. Files are relative to the configuration."""

    ca_file: Path | None = None
    """PEM file with the certificates of the authorities to trust, instead of the public ones. Needs https."""
    client_cert: Path | None = None
    """PEM file with the certificate that syncd identifies itself with; may hold its key, too."""
    client_key: Path | None = None
    """PEM file with the key of `client_cert`, without a password."""
    proxy: SecretStr | None = None
    """URL of the proxy for this API: `http://proxy:3128`. Unset: as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
    NO_PROXY say. Loopback and link-local addresses never pass a proxy."""

    @property
    def tls(self) -> Tls:
        """Return the files for TLS."""
        return Tls(self.ca_file, self.client_cert, self.client_key)

    @property
    def proxy_url(self) -> str | None:
        """Return the URL of the proxy, which may hold a password."""
        return self.proxy.get_secret_value() if self.proxy else None

    def check(self, section: str, url: str, token: SecretStr | None) -> None:
        """Check what can be checked without a request; raises ConfigError, which names the setting."""
        is_socket = url.startswith("unix:")
        check_endpoint(
            Endpoint(
                "metering",  # only for texts that this check does not use
                "http://localhost" if is_socket else url,
                f"{section}.token",
                "",
                token=token.get_secret_value() if token else None,
                unix_socket=url if is_socket else None,
                tls=self.tls,
                proxy=self.proxy_url,
            )
        )

    def in_folder(self, folder: Path) -> Self:
        """Return these settings with files relative to a folder."""
        files = {"ca_file": self.ca_file, "client_cert": self.client_cert, "client_key": self.client_key}
        return self.model_copy(
            update={name: folder / path.expanduser() for name, path in files.items() if path}
        )
