"""What went wrong with a request, in words: why there is no usable answer, and what an API's refusal says."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

import httpcore

from openmeter_plugin.foreign import foreign_text
from openmeter_plugin.network.proxies import Proxy
from syncd.core.errors import MalformedError, RefusedError, UnauthorizedError, UnreachableError
from syncd.http.connection import TOTAL_FACTOR, Answer, AnswerError
from syncd.http.endpoint import Endpoint, variable_of
from syncd.http.json import decode_json
from syncd.http.retry import retry_after

REQUEST_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    OSError,
    UnicodeError,
)
"""What a request without an answer raises; UnicodeError by the lookup of a name that cannot be one."""

_NO_ROUTE: Final = frozenset(
    {
        "",
        "Not Found",
        "Not found",
        "404 page not found",
        "The requested route was not found",
        "no Route matched with those values",
    }
)
"""Texts of a 404 that speak of the path, not of an entity; a page of a web server has none."""

# X509_V_ERR_*: the other codes all mean that nobody trusted has signed it.
_EXPIRED, _NOT_YET_VALID, _OTHER_HOST, _OTHER_ADDRESS = 10, 9, 62, 64
# OpenSSL's names for a connection that was cut, which a retry may fix.
_CUT_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Failures:
    """Makes the errors of one API's client; nothing in them shows a secret."""

    def __init__(self, endpoint: Endpoint, proxy: Proxy | None) -> None:
        self._endpoint = endpoint
        self._proxy = proxy
        password = proxy.credentials[1] if proxy and proxy.credentials else ""
        self._secrets = (*endpoint.secrets(), password)

    def unanswered(self, error: Exception, what: str) -> UnreachableError:
        """Return the error for a request without an answer; `what` is method and path."""
        where = self._endpoint.location + self._via()
        causes = list(_causes(error))
        for cause in causes:
            if problem := self._beyond_retry(cause):
                return UnreachableError(f"{where}: {what} failed: {problem}", retryable=False)
        if isinstance(error, httpcore.ProxyError):
            status = str(error)[:3]
            retryable = status.isdigit() and int(status) >= 500
            problem = f"the proxy answered {self._clean(str(error))}"
            problem += "" if retryable else f". {self._proxy_hint(status)}"
            return UnreachableError(f"{where}: {what} failed: {problem}", retryable=retryable)
        if isinstance(error, httpcore.RemoteProtocolError) and "disconnected" not in str(error):
            text = self._clean(str(error))
            return UnreachableError(f"{where} answered {what} with something that is not HTTP: {text}")
        return UnreachableError(f"{where} did not answer {what}: {self._described(error, causes)}")

    def unreadable(self, error: AnswerError, what: str) -> MalformedError:
        """Return the error for an answer that is too long or cannot be unpacked."""
        return MalformedError(f"{self._endpoint.location} answered {what} with {error}")

    def transient(self, answer: Answer, what: str) -> UnreachableError:
        """Return the error for a status that another try may change."""
        message = f"{self._endpoint.location} answered {what} with HTTP {answer.status} {self.detail(answer)}"
        return UnreachableError(
            message.rstrip(),
            status=answer.status,
            retry_after=retry_after(answer.header("retry-after")),
        )

    def refused(self, answer: Answer, what: str) -> RefusedError | UnauthorizedError | MalformedError:
        """Return the error for an answer that is no success and that another try does not change."""
        endpoint, status, detail = self._endpoint, answer.status, self.detail(answer)
        if status in {401, 403}:
            return UnauthorizedError(self._unauthorized(status, detail, what))
        if 400 <= status < 500:
            message = f"{endpoint.location} refused {what}: HTTP {status} {detail}".rstrip()
            if status == 404 and detail in _NO_ROUTE:
                message += self._url_hint()
            if status == 407:
                message += f". {self._proxy_hint('407')}"
            return RefusedError(message, status=status, detail=detail)
        return MalformedError(
            f"{endpoint.location} answered {what} with HTTP {status}:"
            f" is its URL right ({endpoint.section}.url)?"
        )

    def not_json(self, what: str) -> MalformedError:
        """Return the error for an answer that is not JSON."""
        endpoint = self._endpoint
        return MalformedError(
            f"{endpoint.location} answered {what} with something that is not JSON:"
            f" is its URL right ({endpoint.section}.url)?"
        )

    def detail(self, answer: Answer) -> str:
        """Return the server's explanation in one line, "" if there is none."""
        try:
            body = decode_json(answer.content)
        except (ValueError, RecursionError):
            return ""
        return self._clean(_sentence(explanation(body)))

    def _clean(self, text: str) -> str:
        return foreign_text(text, self._secrets)

    def _via(self) -> str:
        return f" through the proxy {self._proxy.url} ({self._proxy.setting})" if self._proxy else ""

    def _beyond_retry(self, error: BaseException) -> str | None:
        """Return what is wrong and what to do if another try cannot help."""
        section = self._endpoint.section
        match error:
            case socket.gaierror(errno=socket.EAI_AGAIN):
                return None
            case socket.gaierror() | UnicodeError():
                host = urlsplit(self._proxy.url if self._proxy else self._endpoint.url).hostname
                setting = self._proxy.setting if self._proxy else f"{section}.url"
                return f"the host name {host} is unknown. Is {setting} right?"
            case ssl.SSLCertVerificationError():
                return f"its certificate is not valid: {error.verify_message}. {self._tls_hint(error)}"
            case ssl.SSLError() if not isinstance(error, _CUT_TLS):
                return f"TLS failed: {_reason(error)}"
            case httpcore.LocalProtocolError():
                # Its text would show the header, and thus the token.
                return f"the request cannot be written in HTTP. Check {self._endpoint.token_setting}"
            case httpcore.UnsupportedProtocol():
                return f"its URL must begin with http:// or https://. Is {section}.url right?"
            case FileNotFoundError() | PermissionError() if self._endpoint.unix_socket:
                return f"{error.strerror}: is {section}.url right, and may this user open the socket?"
        return None

    def _tls_hint(self, error: ssl.SSLCertVerificationError) -> str:
        section = self._endpoint.section
        if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
            return f"Use the name in the certificate in {section}.url"
        if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
            return "Renew it, or correct this machine's clock"
        if self._endpoint.tls.ca_file:
            return f"{section}.ca_file does not hold the authority that signed it"
        return f"If a private authority signed it, set {section}.ca_file to that authority's certificate"

    def _proxy_hint(self, status: str) -> str:
        setting = self._proxy.setting if self._proxy else "the proxy's address"
        if status == "407":
            return f"It wants a user and a password: put them into {setting} (http://user:password@host:port)"
        return f"Does it allow this address? It is set in {setting}; NO_PROXY names exceptions"

    def _described(self, error: Exception, causes: list[BaseException]) -> str:
        endpoint = self._endpoint
        if isinstance(error, httpcore.ConnectTimeout):
            return f"no connection within {endpoint.timeout:g} s. Is {endpoint.section}.url right?"
        if isinstance(error, httpcore.TimeoutException | TimeoutError):
            return (
                f"time is up ({endpoint.section}.timeout: {endpoint.timeout:g} s for each step,"
                f" {endpoint.timeout * TOTAL_FACTOR:g} s in all)"
            )
        for cause in causes:
            if isinstance(cause, OSError) and cause.strerror:
                return self._clean(cause.strerror)
        return self._clean(str(error)) or "the connection was closed"

    def _url_hint(self) -> str:
        endpoint = self._endpoint
        if endpoint.api in {"plugin", "daemon"}:
            return ""  # their clients say what to do
        path = urlsplit(endpoint.url).path.rstrip("/")
        hint = f". Is {endpoint.section}.url right?"
        if path and endpoint.api == "metering":
            return f"{hint} It needs no path: try it without {path}"
        return hint

    def _unauthorized(self, status: int, detail: str, what: str) -> str:
        endpoint = self._endpoint
        setting = f"{endpoint.token_setting} (environment: {variable_of(endpoint.token_setting)})"
        if not endpoint.token:
            problem = f"no token is set in {setting}"
            problem += "" if status == 401 else ", and access without one lacks permissions"
        elif status == 401:
            problem = f"the token of {setting} is wrong or expired"
        else:
            problem = f"the token of {setting} lacks permissions"
            problem += f" ({detail})" if detail else ""
        return (
            f"{endpoint.location} answered {what} with HTTP {status}: {problem}."
            f" It needs permission to {endpoint.rights}"
        )


def explanation(body: object) -> str:
    """Return why an API refused, from problem+json or Kong's error; "" if it does not say.

    OpenMeter v3 says it in `detail`, but of labels and dimensions only in `extensions.validationErrors`, and
    of parameters also in `invalid_parameters`. Kong's Admin API has `message`.
    """
    if not isinstance(body, dict):
        return ""
    detail = body.get("detail") or body.get("message")
    if isinstance(detail, str) and detail.strip() not in {"", body.get("title")}:
        return detail
    extensions = body.get("extensions")
    errors = extensions.get("validationErrors") if isinstance(extensions, dict) else None
    reasons = [*_reasons(errors, "message"), *_reasons(body.get("invalid_parameters"), "reason")]
    if reasons:
        return "; ".join(dict.fromkeys(reasons))
    found = detail or body.get("title")
    return found if isinstance(found, str) else ""


def _reasons(entries: object, name: str) -> Iterator[str]:
    for entry in entries if isinstance(entries, list) else ():
        text = entry.get(name) if isinstance(entry, dict) else None
        if isinstance(text, str) and text.strip():
            field = entry.get("field")
            yield f"{field}: {text}" if isinstance(field, str) and field else text


def _sentence(text: str) -> str:
    """Cut the schema and the value that OpenMeter's validator appends to its sentence."""
    return re.split(r"\n\s*(?:Schema|Value):\s*\n", text, maxsplit=1)[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _reason(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"}:
        return "the server does not speak TLS on this port. Is https:// in its URL right?"
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason or "BAD_CERTIFICATE" in reason:
        return f"{_words(reason)}. Does it want a client certificate (client_cert, client_key)?"
    return _words(reason) or "for a reason that it did not give"


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
