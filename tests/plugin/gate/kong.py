"""A Kong for the tests of the gate: it decides as the Lua core does, fed over the gate's real socket."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from openmeter_plugin.gate.lines import decode, line


@dataclass
class FakeKong:
    """A Kong whose shared dict is fed by `sync` and reported by `report`."""

    socket: Path
    name: str = "0123456789abcdef"
    since: str = "0.0"
    ceilings: dict[tuple[str, str], float | str] = field(default_factory=dict)
    before: dict[tuple[str, str], float | str] = field(default_factory=dict)
    """The ceilings when the newest full state came: a new one without a base is never above these."""
    counters: dict[tuple[str, str], float] = field(default_factory=dict)
    accounts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    uncounted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests that passed without a ceiling, by subject and feature."""
    stopped: dict[tuple[str, str, str], int] = field(default_factory=dict)
    touched: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        self.client = httpx.Client(transport=transport, base_url="http://gate", timeout=30)

    def request(self, subject: str, *features: str) -> str | None:
        """Return why a request is stopped, None if it passes."""
        account = self.accounts.get(subject)
        if account is None:
            self.seen.add(subject)
            if self.settings.get("unseen") == "deny":
                return "UNSEEN"
            self.uncounted.update((subject, feature) for feature in features)
            return None
        taken = []
        for feature in features:
            key = account, feature
            ceiling = self.ceilings.get(key)
            if ceiling is None:
                self.seen.add(subject)
                self.uncounted[subject, feature] += 1
                continue
            reason = ceiling if isinstance(ceiling, str) else None
            if not isinstance(ceiling, str) and ceiling < 1e300:
                cost = self.costs[feature]
                if self.counters[key] < ceiling:
                    self.counters[key] += cost
                    self.touched.add(key)
                    taken.append((key, cost))
                else:
                    reason = "USAGE_LIMIT_REACHED"
            if reason is not None:
                for other, cost in taken:
                    self.counters[other] -= cost
                entry = subject, feature, reason
                self.stopped[entry] = self.stopped.get(entry, 0) + 1
                return reason
        return None

    def report(self) -> None:
        """Report as a worker does every half second."""
        found = [line("S", subject) for subject in self.seen]
        found += [line("U", *key, str(count)) for key, count in self.uncounted.items()]
        found += [line("P", *key, f"{self.counters[key]:g}") for key in self.touched]
        mode = self.settings.get("mode", "enforce")
        found += [line("D", *key, mode, str(count)) for key, count in self.stopped.items()]
        if found:
            text = "\n".join(["openmeter-report\t1", *found, f"end\t{len(found)}"]) + "\n"
            answer = self.client.post("/v1/report", params={"kong": self.name}, content=text.encode())
            assert answer.status_code == 204, answer.text
        self.seen, self.touched, self.stopped, self.uncounted = set(), set(), {}, Counter()

    def sync(self, wait: float = 0) -> list[str]:
        """Ask for the feed once, or until all slices are there, and apply its lines."""
        applied: list[str] = []
        while True:
            query = {"kong": self.name, "since": self.since, "wait": str(wait), "lua": "test"}
            answer = self.client.get("/v1/feed", params=query)
            assert answer.status_code == 200, answer.text
            head, *rest = answer.text.rstrip("\n").split("\n")
            kind, version, epoch, number, full, more, _ = head.split("\t")
            assert (kind, version) == ("openmeter-gate", "1")
            assert rest.pop() == f"end\t{len(rest)}"
            if full == "full":
                self.before, self.ceilings, self.accounts = self.ceilings, {}, {}
                self.touched |= {key for key, counter in self.counters.items() if counter}
            for text in rest:
                self._apply([decode(part) for part in text.split("\t")])
            applied += rest
            self.since = f"{epoch}.{number}"
            if more == "done":
                if self.before:  # what the full state did not name again is forgotten with its counter
                    self.counters = {key: it for key, it in self.counters.items() if key in self.ceilings}
                    self.touched &= self.counters.keys()
                    self.before = {}
                return applied

    def _apply(self, fields: list[str]) -> None:
        match fields:
            case ["A", account, feature, left, base, _reset, _quota]:
                key = account, feature
                self.counters.setdefault(key, 0.0)
                if left == "-":
                    self.ceilings[key] = 1e300
                elif base == "-":
                    there = self.ceilings.get(key, self.before.get(key))
                    room = self.counters[key] + float(left)
                    self.ceilings[key] = room if not isinstance(there, float) else min(there, room)
                else:
                    self.ceilings[key] = float(base) + float(left)
            case ["D", account, feature, reason, _reset]:
                self.ceilings[account, feature] = reason
            case ["K", subject, account]:
                self.accounts[subject] = account
            case ["X", subject]:
                self.accounts.pop(subject, None)
            case ["Y", account]:
                self.ceilings = {key: it for key, it in self.ceilings.items() if key[0] != account}
            case ["C", name, value]:
                self.settings[name] = value
            case ["F", feature, cost]:
                self.costs[feature] = float(cost)
