"""Which requests pass a proxy: that of a setting, or of the environment.

The environment has HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; lower-case names win. Entries of NO_PROXY
are ``*``, a host (its subdomains are meant too), an address, or a network such as ``10.0.0.0/8`` or
``fd00::/8``; a host or address may have a port. Loopback and link-local addresses never pass a proxy: a token
for this machine's own Admin API would go to the proxy.
"""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment

_SCHEMES = ("http", "https", "socks5", "socks5h")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy's address without its credentials, those, and the setting or variable that names it."""

    url: str
    setting: str
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def is_socks(self) -> bool:
        """Return whether it speaks SOCKS and not HTTP."""
        return self.url.startswith("socks5")


def chosen_proxy(text: str, setting: str, host: str) -> Proxy:
    """Return the proxy that a setting names for requests to `host`; raises ValueError."""
    if is_nearby(host):
        raise ValueError(f"{setting}: {host} is on this machine or link, which is never reached by a proxy")
    return _parsed(text, setting)


def environment_proxy(scheme: str, host: str, port: int | None) -> Proxy | None:
    """Return the environment's proxy for a URL, None for a direct connection; raises ValueError."""
    variables = getproxies_environment()
    name = scheme if variables.get(scheme) else "all"
    text = variables.get(name)
    if not text or is_nearby(host):
        return None
    exempt = [entry.strip() for entry in variables.get("no", "").split(",") if entry.strip()]
    port = port or (443 if scheme == "https" else 80)
    matches = [_matches(entry, host, port) for entry in exempt]  # all, so that an invalid one is an error
    if any(matches):
        return None
    return _parsed(text if "://" in text else f"http://{text}", f"environment variable {name.upper()}_PROXY")


def is_nearby(host: str) -> bool:
    """Return whether a host is loopback or link-local."""
    if host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost"):
        return True
    address = _address(host)
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_link_local or mapped.is_unspecified)


def _parsed(text: str, setting: str) -> Proxy:
    parts = urlsplit(text)
    try:
        valid = parts.scheme in _SCHEMES and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{setting}: a proxy is a URL such as http://proxy:3128 or socks5://proxy:1080")
    if parts.scheme.startswith("socks5") and importlib.util.find_spec("socksio") is None:
        raise ValueError(f"{setting}: a SOCKS proxy needs the package socksio: pip install 'httpcore[socks]'")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    address = parts.netloc.rpartition("@")[2]
    return Proxy(f"{parts.scheme}://{address}", setting, (user, password) if user or password else None)


def _matches(entry: str, host: str, port: int) -> bool:
    """Return whether an entry of NO_PROXY means this host and port; raises ValueError."""
    if entry == "*":
        return True
    address = _address(host)
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        return address is not None and address in network
    name = entry.split("://", 1)[-1].removeprefix("*").removeprefix(".")
    try:
        parts = urlsplit(f"//{name}")
        wanted, wanted_port, rest = parts.hostname, parts.port, parts.path.strip("/")
    except ValueError:
        wanted, wanted_port, rest = None, None, ""
    if not wanted or rest or any(character.isspace() for character in wanted):
        raise ValueError(
            f"environment variable NO_PROXY: {entry!r} is neither a host, an address nor a network;"
            " separate entries by commas"
        )
    if wanted_port is not None and wanted_port != port:
        return False
    if address is not None:
        return _address(wanted) == address
    host = host.lower().rstrip(".")
    return host == wanted or host.endswith(f".{wanted}")


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
