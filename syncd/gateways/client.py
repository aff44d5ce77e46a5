"""Client of the plugin's HTTP API on one gateway (docs/plugin-operations.md, "The HTTP API").

All methods raise GatewayError, which names the gateway, what happened and what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from syncd.config.sections import GatewayConfig
from syncd.core.errors import ApiError, GatewayError, RefusedError, UnreachableError
from syncd.gateways.models import (
    DeadLetterGroups,
    DeadLetters,
    Gate,
    GateChanged,
    Ledger,
    LedgerLine,
    LedgerPage,
    MaybeGate,
    Quarantine,
    QuarantineGroups,
    Readiness,
    Redelivery,
    Replay,
    Replays,
    Spool,
    WholeDeadLetter,
)
from syncd.http.client import ApiClient, Params
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry

_PAGE_SIZE = 10_000
_MAX_PAGES = 10_000
_UNIX = "unix:"
_Answer = TypeVar("_Answer", bound=BaseModel)


class Gateway:
    """One gateway; close it after use. Safe to share between threads."""

    def __init__(
        self,
        config: GatewayConfig,
        index: int = 0,
        *,
        attempts: int = 3,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Connect lazily; `index` is the position in `gateways`, for the message about its token."""
        self.name = config.name
        self.config = config
        socket = config.url.removeprefix(_UNIX) if config.url.startswith(_UNIX) else None
        endpoint = Endpoint(
            api="plugin",
            url=config.url if socket is None else "http://localhost",
            token_setting=f"gateways[{index}].token",
            rights=(
                "use this API: set the one in --api-token-file or OPENMETER_PLUGIN_ADMIN_TOKEN on the gateway"
            ),
            token=config.token.get_secret_value() if config.token else None,
            timeout=config.timeout.total_seconds(),
            unix_socket=socket,
            tls=config.tls,
            proxy=config.proxy_url,
        )
        self.endpoint = endpoint
        self._client = ApiClient(endpoint, Retry(attempts=attempts, sleep=sleep))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def readiness(self) -> Readiness:
        """Return whether the delivery process works; "not ready" is an answer, not an error.

        Needs no token, so it does not check the token.
        """
        return self._ask(Readiness, "GET", "/readyz", expected=frozenset({503}))

    def spool(self) -> Spool:
        """Return the books of the spool, by destination and in total."""
        return self._ask(Spool, "GET", "/v1/spool")

    def ledger(
        self,
        since: datetime,
        until: datetime,
        subject: str | None = None,
        *,
        page_size: int = _PAGE_SIZE,
    ) -> Ledger:
        """Return all pages of the ledger of the hours from `since` up to, not including, `until`.

        The hours with waiting events are those of all subjects. The pages are read one after another, so
        an event delivered between two of them may be in none.
        """
        lines: list[LedgerLine] = []
        waiting: set[datetime] = set()
        params: dict[str, str | int | list[str]] = {"from": _rfc3339(since), "to": _rfc3339(until)}
        params |= {"limit": page_size} | ({"subject": subject} if subject else {})
        seen: set[str] = set()
        for _ in range(_MAX_PAGES):
            known = len(lines) + len(waiting)
            page = self._ask(LedgerPage, "GET", "/v1/ledger", params=params)
            lines += page.lines
            waiting |= set(page.hours_with_waiting_events)
            if page.next is None:
                return Ledger(
                    lines=tuple(lines),
                    hours_with_waiting_events=frozenset(waiting),
                    pruned_up_to=page.pruned_up_to,
                )
            if page.next in seen or len(lines) + len(waiting) == known:
                raise self._error(
                    "GET /v1/ledger returned a page without anything new and named a next one."
                    " Is it the plugin's API?"
                )
            seen.add(page.next)
            params["after"] = page.next
        raise self._error(f"GET /v1/ledger has more than {_MAX_PAGES:,} pages. Is it the plugin's API?")

    def dead_letters(self, after: int = 0, limit: int = 100, group: str | None = None) -> DeadLetters:
        """Return a page of dead letters with ids above `after`, of all or of one group, oldest first."""
        params: dict[str, str | int | list[str]] = {"after": after, "limit": limit}
        params |= {"group": group} if group else {}
        return self._ask(DeadLetters, "GET", "/v1/dead-letters", params=params)

    def dead_letter(self, number: int) -> WholeDeadLetter:
        """Return a dead letter with its event."""
        return self._ask(WholeDeadLetter, "GET", f"/v1/dead-letters/{number}")

    def dead_letter_groups(self) -> DeadLetterGroups:
        """Return the dead letters by the metering API's answer."""
        return self._ask(DeadLetterGroups, "GET", "/v1/dead-letters/groups")

    def replay(self, selection: Mapping[str, object]) -> Replay:
        """Replay dead letters: `selection` is the body of POST /v1/dead-letters/replay.

        Sent once: without an answer, the gateway may have marked them nevertheless. None is sent twice if it
        is asked again, because what is marked is not marked again.
        """
        return self._ask(Replay, "POST", "/v1/dead-letters/replay", body=dict(selection), repeat=False)

    def replay_status(self, number: int) -> Replay:
        """Return what became of a replay."""
        return self._ask(Replay, "GET", f"/v1/replays/{number}")

    def replays(self, limit: int = 20) -> Replays:
        """Return the latest replays, latest first."""
        return self._ask(Replays, "GET", "/v1/replays", params={"limit": limit})

    def quarantine_groups(self) -> QuarantineGroups:
        """Return the requests in quarantine by reason."""
        return self._ask(QuarantineGroups, "GET", "/v1/quarantine/groups")

    def quarantine(self, reason: str, after: int = 0, limit: int = 100) -> Quarantine:
        """Return a page of the requests in quarantine for one reason, oldest first."""
        params: dict[str, str | int | list[str]] = {"after": after, "limit": limit, "reason": reason}
        return self._ask(Quarantine, "GET", "/v1/quarantine", params=params)

    def redeliver(self, since: datetime, until: datetime, subject: str | None = None) -> Redelivery:
        """Start a redelivery of the retained events of a span of event time, of one subject or of all.

        Sent once: without an answer, the request may have been accepted nevertheless.
        """
        body = {"from": _rfc3339(since), "to": _rfc3339(until)} | ({"subject": subject} if subject else {})
        return self._ask(Redelivery, "POST", "/v1/redeliver", body=body, repeat=False)

    def redelivery(self, number: int) -> Redelivery:
        """Return the progress of a redelivery."""
        return self._ask(Redelivery, "GET", f"/v1/redeliver/{number}")

    def gate(self) -> Gate | None:
        """Return the state of the gate, None if this plugin server runs without one."""
        found = self._ask(MaybeGate, "GET", "/v1/gate", expected=frozenset({404})).root
        return found if isinstance(found, Gate) else None

    def allow(self, subject: str, seconds: float, why: str, by: str) -> None:
        """Have the gate let a subject pass for a time; a repeated request changes nothing."""
        body = {"subject": subject, "seconds": seconds, "why": why, "by": by}
        self._ask(GateChanged, "POST", "/v1/gate/overrides", body=body)

    def end_override(self, subject: str) -> None:
        """End an override of the gate; one that is not there has ended."""
        gone, params = frozenset({404}), {"subject": subject}
        self._ask(GateChanged, "DELETE", "/v1/gate/overrides", params=params, expected=gone)

    def _ask(
        self,
        kind: type[_Answer],
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: object = None,
        repeat: bool = True,
        expected: frozenset[int] = frozenset(),
    ) -> _Answer:
        try:
            answer = self._client.request(
                method, path, params=params, body=body, repeat=repeat, expected=expected
            )
            return kind.model_validate(answer)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(str(part) for part in fault["loc"]) or "the answer"
            raise self._error(
                f"{method} {path} did not answer as the plugin does ({place}: {fault['msg']})."
                " Is its URL right, and its plugin at least as new as this syncd?"
            ) from None
        except ApiError as error:
            raise self._error(f"{error}{_advice(error)}") from None

    def _error(self, problem: str) -> GatewayError:
        return GatewayError(self.name, problem)


def _advice(error: ApiError) -> str:
    match error:
        case UnreachableError(status=None):
            return ". Is the plugin running there, with `serve --api` on this address?"
        case RefusedError(status=421):
            return ". Use the exact address that it listens on in its URL"
        case RefusedError(status=404, detail="" | "Not Found"):
            return ". Is its URL that of the plugin's API?"
        case _:
            return ""


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
