"""A gate that sends what a test says, over the connections of a `Node`, and can be dead, hung or garbled."""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal
from urllib.parse import parse_qsl, urlsplit

from tests.plugin.lua.gate_node import Link, Request

HEAD_END: Final = b"\r\n\r\n"
STATUSES: Final = {
    "USAGE_LIMIT_REACHED": 429,
    "FEATURE_UNAVAILABLE": 403,
    "FEATURE_NOT_FOUND": 403,
    "CUSTOMER_NOT_FOUND": 403,
    "NO_CREDIT_AVAILABLE": 402,
    "STALE": 503,
}


def line(*fields: object) -> str:
    """Return a line of the protocol."""
    return "\t".join(str(field) for field in fields)


def settings(hash_: str = "1", *, features: str = "requests", **values: str) -> list[str]:
    """Return a group of settings: enforce everywhere, the consumer's name is the subject."""
    all_values = {
        "mode": "enforce",
        "unseen": "allow",
        "no_subject": "allow",
        "on_stale": "allow",
        "max_stale": "60",
        "headers": "on",
        "prefix.consumer": "consumer:",
        "prefix.application": "app:",
        "require_consumer": "on",
        "anonymous": "off",
    } | {name.replace("prefix_", "prefix."): value for name, value in values.items()}
    return [
        line("C", "begin", hash_),
        *(line("C", name, value) for name, value in all_values.items()),
        line("L", 1, "consumer", "username"),
        *(line("F", feature, 1) for feature in features.split(",")),
        line("R", "all", "*", features),
        *(line("W", reason, status, f"No: {reason}") for reason, status in STATUSES.items()),
    ]


class ScriptedGate:
    """The gate's side of the protocol, in this process."""

    def __init__(self, *, slice_size: int = 2000, epoch: int = 1) -> None:
        self.state: Literal["up", "dead", "hung", "starting"] = "up"
        self.garbage: bytes | None = None
        self.slice_size = slice_size
        self.epoch = f"{epoch:016x}"
        self.settings: list[str] = settings()
        self.changes: list[tuple[int, str, str]] = []
        self.number = 0
        self.counters: dict[tuple[str, str], float] = {}
        self.seen: Counter[str] = Counter()
        self.uncounted: Counter[tuple[str, str]] = Counter()
        self.stops: Counter[tuple[str, ...]] = Counter()
        self.figures: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.refused_reports = 0
        self.feeds_left: int | None = None
        """After so many answers of the feed it hangs."""

    # Peer

    def connect(self, _address: str) -> Link | None:
        """Accept, unless it is dead."""
        return None if self.state == "dead" else GateLink(self)

    # What a test sends

    def configure(self, lines: list[str]) -> None:
        """Send new settings."""
        self.settings = lines
        for one in lines:
            self._change("settings", one)

    def allow(
        self, subject: str, left: object = "-", base: object = 0, *, feature: str = "requests", **more: object
    ) -> None:
        """Let a subject, which is its own account, pass so often."""
        self.account(subject, subject)
        text = line("A", subject, feature, left, base, more.get("reset", 0), more.get("quota", "-"))
        self._change(f"{feature} {subject}", text)

    def deny(self, subject: str, reason: str, *, feature: str = "requests", reset: float = 0) -> None:
        """Deny a subject, which is its own account."""
        self.account(subject, subject)
        self._change(f"{feature} {subject}", line("D", subject, feature, reason, reset))

    def account(self, subject: str, account: str) -> None:
        """Say who pays for a subject."""
        self._change(f"subject {subject}", line("K", subject, account))

    def send(self, text: str) -> None:
        """Send any line."""
        self._change(text, text)

    def restart(self, epoch: int) -> None:
        """Lose all changes: the next answer is a full state of what is sent from now on."""
        self.epoch, self.number, self.changes = f"{epoch:016x}", 0, []
        self.counters = {}

    def _change(self, key: str, text: str) -> None:
        self.number += 1
        self.changes.append((self.number, key, text))

    # What a node asks

    def answer(self, request: Request) -> bytes | None:
        """Answer a request; None: not yet."""
        if self.state == "hung":
            return None
        if self.garbage is not None:
            return self.garbage
        if self.state == "starting":
            return response(503, "starting")
        if request.path == "/v1/report":
            return self._report(request)
        if self.feeds_left is not None:
            if not self.feeds_left:
                return None
            self.feeds_left -= 1
        epoch, _, number = request.query["since"].rpartition(".")
        full = epoch != self.epoch
        since = 0 if full else int(number)
        if not full and since >= self.number:
            return None
        return response(200, self.feed(since, full))

    def feed(self, since: int = 0, full: bool = True) -> str:
        """Return one answer of the feed."""
        newest = {key: number for number, key, _ in self.changes if key != "settings"}
        due = [one for one in self.changes if one[0] > since and newest.get(one[1], one[0]) == one[0]]
        taken = due[: self.slice_size]
        reached = self.number if len(taken) == len(due) else taken[-1][0]
        lines = [text for _, key, text in taken if not (full and key == "settings")]
        lines = [*(self.settings if full else []), *lines]
        kind, more = "full" if full else "changes", "done" if len(taken) == len(due) else "more"
        head = line("openmeter-gate", 1, self.epoch, reached, kind, more, "1800000000.000")
        return "\n".join([head, *lines, line("end", len(lines))]) + "\n"

    def heartbeat(self) -> bytes:
        """Return the answer without news."""
        head = line("openmeter-gate", 1, self.epoch, self.number, "changes", "done", "1800000000.000")
        return response(200, f"{head}\nend\t0\n")

    def _report(self, request: Request) -> bytes:
        if self.refused_reports:
            self.refused_reports -= 1
            return response(500, "no")
        head, *lines, end, rest = request.body.split("\n")
        assert (head, end, rest) == (line("openmeter-report", 1), line("end", len(lines)), "")
        for one in lines:
            kind, *fields = one.split("\t")
            if kind == "S":
                self.seen[fields[0]] += 1
            elif kind == "U":
                self.uncounted[fields[0], fields[1]] += int(fields[2])
            elif kind == "P":
                self.counters[fields[0], fields[1]] = float(fields[2])
            elif kind == "D":
                self.stops[tuple(fields[:4])] += int(fields[4])
            else:
                assert kind == "M"
                self.figures[fields[0]] += int(float(fields[1]))
        return response(204, "")


class GateLink:
    """A connection to a scripted gate."""

    def __init__(self, gate: ScriptedGate) -> None:
        self._gate = gate
        self._got = b""
        self._out = b""
        self._pending: Request | None = None
        self._asked = 0
        self.closed = False

    def send(self, data: bytes) -> bool:
        """Take a request."""
        if self.closed or self._gate.state == "dead":
            return False
        self._got += data
        head, end, body = self._got.partition(HEAD_END)
        length = next(
            (int(one[15:]) for one in head.split(b"\r\n") if one.lower().startswith(b"content-length:")), 0
        )
        assert end
        assert len(body) == length
        method, target, version = head.split(b"\r\n")[0].decode().split(" ")
        assert version == "HTTP/1.1"
        split = urlsplit(target)
        self._pending = Request(method, split.path, dict(parse_qsl(split.query)), body.decode())
        self._gate.requests.append(self._pending)
        self._got, self._asked = b"", 0
        return True

    def receive(self, size: int, exact: bool) -> bytes | Literal[False] | None:
        """Give what there is of the answer."""
        if self._gate.state == "dead" or self.closed:
            return False
        if self._pending is not None:
            answer = self._gate.answer(self._pending)
            if answer is None and self._gate.state == "up":
                self._asked += 1
                if self._asked >= 40:  # 40 x 0.05 s: as long as the long poll waits
                    answer = self._gate.heartbeat()
            if answer is None:
                return None
            self._out, self._pending = answer, None
        if exact and len(self._out) < size:
            return False
        taken, self._out = self._out[:size], self._out[size:]
        return taken or None

    def close(self) -> None:
        """Close it."""
        self.closed = True


def response(status: int, body: str) -> bytes:
    """Return an HTTP answer."""
    content = body.encode()
    length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(content)
    return b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\n%s\r\n%s" % (status, length, content)
