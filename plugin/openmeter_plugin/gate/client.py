"""Client of the metering API's access endpoints, with what each dialect lacks made up for by another.

  * openmeter-v3: access by `entitlement-access/query` (100 subjects a call), balances by v1's `access`. A
    server without the query is asked as openmeter-v1.
  * openmeter-v1: one customer a call: who it is by `customers?subject=`, access and balances by `access`.
  * konnect: access by the query; balances by `entitlement-access/features/<key>/value` where the API has it.

Facts of a recorded OpenMeter: `hasAccess` is left out where it is false, `access` takes a customer's id or
key but no subject, and `include_credits` has no effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import httpcore
import orjson
from pydantic import SecretStr

from openmeter_plugin import __version__
from openmeter_plugin.foreign import foreign_text
from openmeter_plugin.gate.accounts import Reading, Reason
from openmeter_plugin.gate.settings import Settings
from openmeter_plugin.network.tls import Tls

_REASONS: Final = {
    "usage_limit_reached": Reason.USAGE_LIMIT_REACHED,
    "feature_unavailable": Reason.FEATURE_UNAVAILABLE,
    "feature_not_found": Reason.FEATURE_NOT_FOUND,
    "no_credit_available": Reason.NO_CREDIT_AVAILABLE,
}
_MISSING: Final = frozenset({404, 405, 501})
_GONE: Final = frozenset({404, 410, 412})
MAX_CONNECTIONS: Final = 32
"""Calls in flight, at most: if the metering API is slow, the gate asks less, not more at once."""
_DEFAULT_RETRY_AFTER: Final = 1.0


_HEADERS: Final[dict[bytes | str, bytes | str]] = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": f"openmeter-gate/{__version__}",
}
_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
    OSError,  # TimeoutError among them
)


class Answer(NamedTuple):
    """An answer of the metering API."""

    status_code: int
    headers: Sequence[tuple[bytes, bytes]]
    content: bytes


class ApiError(Exception):
    """The metering API did not answer as it should; `kind` is a label of metrics."""

    def __init__(self, kind: str, detail: str, retry_after: float = _DEFAULT_RETRY_AFTER) -> None:
        super().__init__(detail)
        self.kind = kind
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Access:
    """Whose a subject is (None for nobody), and its readings by feature."""

    subject: str
    account: str | None
    readings: Mapping[str, Reading]


class AccessClient:
    """Asks the metering API, and notes each call with `spend` before it is sent.

    Times of readings are those of `clock`, taken before a call is sent.
    """

    def __init__(
        self, settings: Settings, spend: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        metering = settings.metering
        self._settings = settings
        self._spend = spend
        self._clock = clock
        self._konnect = metering.dialect == "konnect"
        base = metering.url.rstrip("/")
        self._v1 = f"{base}/api/v1"
        self._v2 = f"{base}/api/v2"
        self._v3 = f"{base}/openmeter" if self._konnect else f"{base}/api/v3/openmeter"
        self.has_query = metering.dialect != "openmeter-v1"
        self.has_numbers = True
        self.has_resets = not self._konnect
        self.calls: dict[tuple[str, str], int] = {}
        self._features = [feature.key for feature in settings.features if feature.credit is None]
        self._credits = {f.key: f.credit for f in settings.features if f.credit is not None}
        seconds = metering.timeout
        self._extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), seconds)}
        self._http = httpcore.AsyncConnectionPool(
            ssl_context=Tls().context() if metering.url.startswith("https:") else None,
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_CONNECTIONS,
            keepalive_expiry=60,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def access(self, subjects: Sequence[str]) -> list[Access] | None:
        """Return the access of up to 100 subjects, None if only one can be asked for; raises ApiError."""
        if self.has_query:
            found = await self._query(subjects)
            if found is not None:
                return found
            self.has_query = False  # an older server
        return [await self._v1_access(subjects[0])] if len(subjects) == 1 else None

    async def _query(self, subjects: Sequence[str]) -> list[Access] | None:
        asked = self._clock()
        body = {"customer": {"keys": list(subjects)}}
        if self._features:
            body["feature"] = {"keys": self._features}
        url = f"{self._v3}/entitlement-access/query?page%5Bsize%5D=100"
        answer = await self._call("query", "POST", url, body)
        if answer.status_code in _MISSING:
            if self._konnect:
                raise ApiError("missing", f"{url} is not there: is metering.url right?")
            return None
        document = self._document(answer)
        found: list[Access] = []
        for item in document.get("data", ()):
            readings = {
                feature: Reading(asked, _reason(value), exact=False)
                for feature, value in item["features"].items()
                if feature in self._features
            }
            account = str(item["customer"]["id"])
            found += [Access(str(subject), account, readings) for subject in dict.fromkeys(item["matched"])]
        for error in document.get("errors", ()):
            if error.get("code") == "customer_not_found":
                found.append(self._nobody(str(error["customer"]), asked))
        wanted = set(subjects)
        return [access for access in found if access.subject in wanted]

    def _nobody(self, subject: str, asked: float) -> Access:
        unknown = Reading(asked, Reason.CUSTOMER_NOT_FOUND, exact=True)
        return Access(subject, None, dict.fromkeys((*self._features, *self._credits), unknown))

    async def _v1_access(self, subject: str) -> Access:
        asked = self._clock()
        account = await self._v1_customer(subject)
        if account is None:
            return self._nobody(subject, asked)
        return Access(subject, account, await self.balances(account) or {})

    async def _v1_customer(self, subject: str) -> str | None:
        """Return the id of the customer of a subject: the owner of the key comes first."""
        answer = await self._call("customer", "GET", f"{self._v1}/customers/{quote(subject, safe='')}")
        if answer.status_code == 200:
            customer = self._document(answer)
            if customer.get("key") == subject and "deletedAt" not in customer:
                return str(customer["id"])
        elif answer.status_code not in _GONE:
            self._document(answer)
        url = f"{self._v1}/customers?pageSize=100&subject={quote(subject, safe='')}"
        for customer in self._document(await self._call("customer", "GET", url)).get("items", ()):
            if subject in (customer.get("usageAttribution") or {}).get("subjectKeys", ()):
                return str(customer["id"])
        return None

    async def balances(self, account: str) -> dict[str, Reading] | None:
        """Return exact readings of an account; None if its customer is gone. Raises ApiError."""
        asked = self._clock()
        readings: dict[str, Reading] | None = {}
        if self._features and self.has_numbers:
            readings = await (self._values(account) if self._konnect else self._v1_values(account, asked))
        if readings is not None:
            for feature, currency in self._credits.items():
                readings[feature] = await self._credit(account, currency)
        return readings

    async def _v1_values(self, account: str, asked: float) -> dict[str, Reading] | None:
        answer = await self._call("access", "GET", f"{self._v1}/customers/{quote(account, safe='')}/access")
        if answer.status_code in _GONE:
            return None
        values = self._document(answer).get("entitlements", {})
        readings = {key: _exact(values[key], asked) for key in self._features if key in values}
        if not self.has_query:
            missing = Reading(asked, Reason.FEATURE_UNAVAILABLE, exact=True)
            readings |= {key: missing for key in self._features if key not in values}
        return readings

    async def _values(self, account: str) -> dict[str, Reading] | None:
        readings = {}
        for key in self._features:
            asked = self._clock()
            path = f"customers/{quote(account, safe='')}/entitlement-access/features/{key}/value"
            answer = await self._call("value", "GET", f"{self._v3}/{path}")
            if answer.status_code in _GONE:
                self.has_numbers = False  # access alone decides
                return {}
            value = self._document(answer)
            names = {"has_access": "hasAccess", "total_available_grant_amount": "totalAvailableGrantAmount"}
            readings[key] = _exact({names.get(name, name): part for name, part in value.items()}, asked)
        return readings

    async def _credit(self, account: str, currency: str | None) -> Reading:
        asked = self._clock()
        url = (
            f"{self._v3}/customers/{quote(account, safe='')}/credits/balance?filter%5Bcurrency%5D={currency}"
        )
        document = self._document(await self._call("credits", "GET", url))
        live = sum(float(item["live"]) for item in document["balances"] if item["currency"] == currency)
        return Reading(asked, None if live > 0 else Reason.NO_CREDIT_AVAILABLE, exact=True)

    async def reset(self, account: str, feature: str) -> float:
        """Return when the allowance of a feature is renewed, in seconds since 1970; 0 if not known."""
        url = f"{self._v2}/customers/{quote(account, safe='')}/entitlements/{quote(feature, safe='')}"
        answer = await self._call("entitlement", "GET", url)
        if answer.status_code in _GONE:
            return 0.0
        return _moment((self._document(answer).get("currentUsagePeriod") or {}).get("to"))

    async def _call(self, name: str, method: str, url: str, body: object = None) -> Answer:
        headers: dict[bytes | str, bytes | str] = dict(_HEADERS)
        if (token := self._token()) is not None:
            headers["authorization"] = f"Bearer {token.get_secret_value()}"
        content = b"" if body is None else orjson.dumps(body)
        self._spend()
        try:
            async with asyncio.timeout(self._settings.metering.timeout * 2):
                response = await self._http.request(
                    method, url, headers=headers, content=content, extensions=self._extensions
                )
        except _ERRORS as error:
            self._count(name, "unreachable")
            detail = foreign_text(str(error)) or "no answer"
            raise ApiError("unreachable", f"{type(error).__name__}: {detail}") from None
        answer = Answer(response.status, response.headers, response.content)
        self._count(name, str(answer.status_code))
        if answer.status_code == 429:
            raise ApiError("too_many_requests", "HTTP 429", _retry_after(answer))
        if answer.status_code in (401, 403):
            raise ApiError("token_refused", f"HTTP {answer.status_code}: the token is missing or refused")
        return answer

    def _token(self) -> SecretStr | None:
        try:
            return self._settings.token()
        except OSError as error:
            raise ApiError("token_refused", f"token_file cannot be read: {error.strerror}") from None

    def _count(self, name: str, outcome: str) -> None:
        self.calls[name, outcome] = self.calls.get((name, outcome), 0) + 1

    def _document(self, answer: Answer) -> dict[str, Any]:
        if answer.status_code != 200:
            text = answer.content.decode("utf-8", "replace")
            raise ApiError("failed", f"HTTP {answer.status_code}: {foreign_text(text)}")
        try:
            document = orjson.loads(answer.content)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ApiError("failed", "the answer is not a JSON object: is metering.url right?")
        return document


def _reason(value: Mapping[str, Any]) -> Reason | None:
    if value.get("has_access") is True:
        return None
    return _REASONS.get((value.get("reason") or {}).get("code", ""), Reason.FEATURE_UNAVAILABLE)


def _exact(value: Mapping[str, Any], asked: float) -> Reading:
    balance, quota = value.get("balance"), value.get("totalAvailableGrantAmount")
    if value.get("hasAccess") is not True:
        reason = Reason.FEATURE_UNAVAILABLE if balance is None else Reason.USAGE_LIMIT_REACHED
        return Reading(asked, reason, exact=True, balance=balance, quota=quota)
    if balance is not None and balance <= 0:  # a soft limit
        return Reading(asked, None, exact=True)
    return Reading(asked, None, exact=True, balance=balance, quota=quota)


def _retry_after(answer: Answer) -> float:
    try:
        given = next((value for name, value in answer.headers if name.lower() == b"retry-after"), b"")
        return min(max(float(given), 0.0), 300.0)
    except ValueError:
        return _DEFAULT_RETRY_AFTER


def _moment(text: object) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0
