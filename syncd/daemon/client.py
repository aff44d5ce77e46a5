"""HTTP client of the daemon, for ``syncd resync`` and ``syncd status``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from syncd.core.errors import DaemonError, RefusedError, UnreachableError
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_object
from syncd.http.retry import Retry
from syncd.runs.run import FINISHED, RunState

_API = "the daemon"
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class DaemonClient:
    """The HTTP API of a running daemon; every method raises DaemonError or another ApiError."""

    url: str
    token: str | None = None
    sleep: Callable[[float], object] = time.sleep

    def request(self, **options: bool | str | None) -> dict[str, object]:
        """Request a run with these options of POST /v1/syncs and return the queued run."""
        return self._call("POST", "/v1/syncs", options)

    def status(self) -> dict[str, object]:
        """Return the daemon's status."""
        return self._call("GET", "/v1/status", None)

    def get(self, run_id: str) -> dict[str, object]:
        """Return a run."""
        return self._call("GET", f"/v1/syncs/{run_id}", None)

    def wait(self, run: dict[str, object]) -> dict[str, object]:
        """Poll until the run has ended, without a time limit, and return it."""
        while RunState(str(run["state"])) not in FINISHED:
            self.sleep(_POLL_SECONDS)
            run = self.get(str(run["id"]))
        return run

    def _call(self, method: str, path: str, body: object) -> dict[str, object]:
        endpoint = Endpoint("daemon", self.url, "daemon.token", "request runs", token=self.token)
        try:
            with ApiClient(endpoint, Retry(attempts=3)) as client:
                return expect_object(client.request(method, path, body=body), _API, path)
        except UnreachableError as error:
            advice = ". Is `syncd run` running with this configuration?" if error.status is None else ""
            raise DaemonError(f"{error}{advice}") from None
        except RefusedError as error:
            # It remembers the latest runs only until it ends.
            advice = ". Was the daemon restarted?" if error.status == 404 else ""
            raise DaemonError(f"{error}{advice}") from None
