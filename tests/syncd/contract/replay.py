"""Sends recorded requests to another server, and compares its answers with those recorded.

Ids differ from server to server and times from run to run, so ids are mapped while both answers are walked in
parallel, and times are moved to the current hour: GET /events of OpenMeter looks back 32 days only, and an
event without a time is counted in the hour in which it arrives.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx

from tests.syncd.contract.recordings import Exchange

_ULID = re.compile(r"\b0[0-9A-HJKMNP-TV-Z]{25}\b")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_HOUR = re.compile(r"(2026-(?:10|11|12)-\d\dT\d\d)(?=(?::|%3A)\d\d)")
_RECORDED_AT = datetime(2026, 11, 28, 19, tzinfo=UTC)
_TIME_FOR_A_REPLAY = timedelta(seconds=15)

# Texts for people, which may be worded otherwise as long as there is one.
_WORDED = {"detail", "reason", "message"}
# What is in a plan: the sandbox has no plans.
_OF_PLANS = {"phases"}
# Cursors are of the server's own making: that of the answer is sent where the recorded one was.
_CURSORS = {"next", "previous", "first", "last"}
# These come in no order that OpenMeter promises; events of one second neither.
_UNORDERED = re.compile(r"/query\b|/(meters|subjects|events)(\?|$)")
_OF_CONNECTION = {"host", "content-length", "connection", "accept-encoding", "transfer-encoding"}


@dataclass(slots=True)
class Replay:
    """One conversation with a server; keeps what the recorded ids are called there."""

    client: httpx.Client
    ids: dict[str, str] = field(default_factory=dict)
    hours: timedelta = field(default_factory=lambda: _this_hour() - _RECORDED_AT)

    def send(self, exchange: Exchange) -> httpx.Response:
        """Send a recorded request with this server's ids."""
        path = self._translated(exchange.path, quoted=True)
        content = self._translated(exchange.content()).encode()
        request = self.client.build_request(exchange.method, path, content=content)
        # Only the recorded headers: httpx would add a content type of its own.
        for name in ("Accept", "Accept-Encoding", "User-Agent", "Content-Type"):
            request.headers.pop(name, None)
        request.headers.update({n: v for n, v in exchange.headers.items() if n.lower() not in _OF_CONNECTION})
        return self.client.send(request)

    def differences(
        self, exchange: Exchange, response: httpx.Response, *, any_order: bool = False
    ) -> list[str]:
        """Say where the answer differs from the one recorded, and learn the ids in it.

        With `any_order` only the number of items in the answer is compared: which of them are on a page
        depends on an order that the real server does not promise.
        """
        if response.status_code != exchange.status:
            return [f"status {response.status_code} instead of {exchange.status}: {response.text[:300]}"]
        found = list(self._header_differences(exchange, response))
        answer = response.json() if response.content else None
        if any_order:
            return found + self._compare_counts(exchange.answer, answer)
        unordered = _UNORDERED.search(exchange.path) is not None
        found += self._compare(exchange.answer, answer, "", unordered=unordered)
        return found

    def _compare_counts(self, recorded: Any, given: Any) -> list[str]:
        if isinstance(recorded, dict) and "meta" in recorded:
            found = list(self._compare(recorded["meta"], given["meta"], ".meta", unordered=False))
        else:
            found = []
        same = len(_items(recorded)) == len(_items(given))
        return found if same else [*found, f"another number of items: {given!r:.300}"]

    def _header_differences(self, exchange: Exchange, response: httpx.Response) -> Iterator[str]:
        wanted = exchange.answer_headers.get("Content-Type", "").partition(";")[0]
        given = response.headers.get("Content-Type", "").partition(";")[0]
        if wanted != given:
            yield f"content type {given!r} instead of {wanted!r}"

    def _translated(self, text: str, *, quoted: bool = False) -> str:
        moved = _HOUR.sub(self._moved, text)
        for recorded, ours in self.ids.items():
            moved = moved.replace(recorded, ours)
            if quoted:
                moved = moved.replace(quote(recorded, safe=""), quote(ours, safe=""))
        return moved

    def _compare(self, recorded: Any, given: Any, place: str, *, unordered: bool) -> Iterator[str]:
        name = place.rpartition(".")[2]
        if type(recorded) is not type(given):
            yield f"{place}: {given!r} instead of {recorded!r}"
        elif isinstance(recorded, dict):
            recorded = self._with_ours(recorded, given)
            for missing in recorded.keys() - given.keys():
                yield f"{place}.{missing} is missing"
            for extra in given.keys() - recorded.keys():
                yield f"{place}.{extra} is too much: {given[extra]!r}"
            for key in sorted(recorded.keys() & given.keys()):
                yield from self._compare(recorded[key], given[key], f"{place}.{key}", unordered=unordered)
        elif name in _OF_PLANS:
            return
        elif isinstance(recorded, list):
            yield from self._compare_lists(recorded, given, place, unordered=unordered)
        elif isinstance(recorded, str):
            yield from self._compare_texts(recorded, given, place, name)
        elif recorded != given:
            yield f"{place}: {given!r} instead of {recorded!r}"

    def _with_ours(self, recorded: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a recorded object with its ids among the names translated; a single new one is learned."""
        new = [name for name in recorded if _ULID.fullmatch(name) and name not in self.ids]
        ours = [name for name in given if _ULID.fullmatch(name) and name not in self.ids.values()]
        if len(new) == len(ours) == 1:
            self.ids[new[0]] = ours[0]
        return {self.ids.get(name, name): value for name, value in recorded.items()}

    def _compare_lists(
        self, recorded: list[Any], given: list[Any], place: str, *, unordered: bool
    ) -> Iterator[str]:
        if len(recorded) != len(given):
            yield f"{place}: {len(given)} items instead of {len(recorded)}: {given!r:.300}"
            return
        if unordered:
            recorded = sorted(recorded, key=lambda item: self._rank(item, translate=True))
            given = sorted(given, key=lambda item: self._rank(item, translate=False))
        for index, (one, other) in enumerate(zip(recorded, given, strict=True)):
            yield from self._compare(one, other, f"{place}[{index}]", unordered=unordered)

    def _compare_texts(self, recorded: str, given: str, place: str, name: str) -> Iterator[str]:
        if name in _WORDED:
            if bool(recorded) != bool(given):
                yield f"{place}: {given!r} instead of {recorded!r}"
        elif name == "instance" or (_TIME.fullmatch(recorded) and _TIME.fullmatch(given)):
            return
        elif name in _CURSORS:
            self.ids[recorded] = given
        elif _ULID.fullmatch(recorded) and _ULID.fullmatch(given):
            if self.ids.setdefault(recorded, given) != given:
                yield f"{place}: {given} instead of {self.ids[recorded]} for the recorded {recorded}"
        elif self._translated(recorded) != given:
            yield f"{place}: {given!r:.200} instead of {recorded!r:.200}"

    def _moved(self, hour: re.Match[str]) -> str:
        return (datetime.fromisoformat(f"{hour[0]}:00+00:00") + self.hours).strftime("%Y-%m-%dT%H")

    def _rank(self, item: Any, *, translate: bool) -> str:
        """Return a text to sort by that is the same on both servers: without times, and ids not yet known."""
        text = json.dumps(item, sort_keys=True, ensure_ascii=False)
        text = _TIME.sub("", self._translated(text) if translate else text)
        known = set(self.ids.values())
        return _ULID.sub(lambda found: found[0] if found[0] in known else "", text)


def _items(answer: Any) -> list[Any]:
    """Return the items of a list in any of its shapes."""
    items: list[Any] = answer if isinstance(answer, list) else answer.get("items", answer.get("data"))
    return items


def _this_hour() -> datetime:
    """Return the beginning of an hour that does not end during the replay."""
    now = datetime.now(UTC)
    left = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1) - now
    if left < _TIME_FOR_A_REPLAY:
        time.sleep(left.total_seconds())
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
