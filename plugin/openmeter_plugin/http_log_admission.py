"""Which posts of http-log are let in: decided by their head alone."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from openmeter_plugin.http_log_answers import RefusalError
from openmeter_plugin.http_log_config import HttpLogSettings


class Admission:
    """Knows the shared secrets and the limits of a post."""

    def __init__(self, settings: HttpLogSettings) -> None:
        self._secrets = [secret.get_secret_value().encode() for secret in settings.secret]
        self._header_name = settings.header
        self._header = settings.header.encode()
        self._max_body = settings.max_body

    def check(self, request: Request) -> None:
        """Raise RefusalError for a post whose body need not be looked at."""
        if self._secrets and not self._knows_secret(request):
            raise RefusalError(401, f"the header {self._header_name} does not hold the shared secret")
        # Also keeps web pages out: a browser asks before it sends this type to another site.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusalError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusalError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        """Raise RefusalError where a body of so many bytes is too large."""
        if size > self._max_body:
            limit = self._max_body.human_readable()
            raise RefusalError(
                413, f"the body is larger than http_log.max_body ({limit}); lower queue.max_batch_size"
            )

    def _knows_secret(self, request: Request) -> bool:
        given = [value for name, value in request.headers.raw if name == self._header]
        if len(given) != 1:
            return False
        # Each is compared, so that the time does not tell which one it was.
        known = False
        for secret in self._secrets:
            known |= hmac.compare_digest(given[0], secret)
        return known
