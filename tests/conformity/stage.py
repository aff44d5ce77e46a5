"""What a scenario works with: the server, one dialect, and syncd in a folder of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from syncd.config.settings import Dialect
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.metering.base import MeteringApi
from syncd.metering.dialects import DIALECTS
from tests.conformity.server import Server
from tests.syncd.processes import Project, Result

_T = TypeVar("_T")
IN_SYNC, DRIFT, APPLIED, BLOCKED, ERROR = 0, 2, 0, 3, 1


class Differs(Exception):
    """The scenario went otherwise than it must; the message says what was seen."""


class NotOffered(Exception):
    """The server has not what the scenario needs; the message says what."""


def expect(holds: object, what: str) -> None:
    """Raise Differs unless it holds; `what` says what was seen instead."""
    if not holds:
        raise Differs(what)


@dataclass
class Stage:
    """A scenario's part of the server. `name` is in everything that it creates, and its `owner_id`."""

    server: Server
    dialect: Dialect
    name: str
    folder: Path
    token: str | None
    flush: timedelta
    arrival: timedelta
    """How long an event may take until it is counted."""
    _project: Project = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._project = Project(self.folder, "http://127.0.0.1:9")
        self.configure()

    # syncd

    def configure(self, **sections: object) -> None:
        """Write the configuration; sections replace or add to the usual ones."""
        metering: dict[str, object] = {"dialect": self.dialect, "url": self.server.metering_url(self.dialect)}
        if self.token:
            metering["token"] = self.token
        document: dict[str, object] = {
            "owner_id": self.name,
            "sources": [{"type": "declarative-file", "path": "kong.yml"}],
            "mapping": {"group_by": "tag", "subject_field": "username", "key": "{username}"},
        }
        document |= {name: section for name, section in sections.items() if name != "metering"}
        document["metering"] = metering | dict(sections.get("metering") or {})  # type: ignore[call-overload]
        self._project.config.write_text(json.dumps(document))
        self._project.config.chmod(0o600)

    def consumers(self, *consumers: Mapping[str, object]) -> None:
        """Let Kong have these consumers and no others."""
        document = {"_format_version": "3.0", "consumers": list(consumers)}
        (self.folder / "kong.yml").write_text(json.dumps(document))

    def named(self, name: str) -> str:
        """Return a key, subject or username of this scenario."""
        return f"{self.name}-{name}"

    def users(self, *names: str) -> list[str]:
        """Let Kong have consumers with these names, and return their usernames, which are their ids, too."""
        usernames = [self.named(name) for name in names]
        self.consumers(*({"id": username, "username": username} for username in usernames))
        return usernames

    @property
    def project(self) -> Project:
        """Return the folder, for commands as processes of their own."""
        return self._project

    def syncd(self, *arguments: str, ends_with: int | Sequence[int] | None = None) -> Result:
        """Run a command of syncd; raises Differs if it ends with another exit status."""
        result = self._project.call(*arguments)
        allowed = (ends_with,) if isinstance(ends_with, int) else ends_with
        if allowed is not None and result.returncode not in allowed:
            said = " ".join((result.stderr or result.stdout).split())[-400:]
            raise Differs(f"syncd {' '.join(arguments)} ended with {result.returncode}: {said}")
        return result

    def plan(self) -> dict[str, Any]:
        """Return the plan."""
        document: dict[str, Any] = json.loads(self.syncd("plan", "--output=json", ends_with=(0, 2)).stdout)
        return document

    # The server

    @contextmanager
    def client(self) -> Iterator[MeteringApi]:
        """Open syncd's client of this dialect."""
        url = self.server.metering_url(self.dialect)
        endpoint = Endpoint("metering", url, "metering.token", "read and write", token=self.token, timeout=30)
        with closing(DIALECTS[self.dialect].open(endpoint, Retry(attempts=2))) as api:
            yield api

    def customers(self) -> dict[str, dict[str, Any]]:
        """Return the customers of this scenario by key, as the server shows them."""
        ours = [each for each in self.server.customers().values() if self.server.is_ours(each)]
        return {str(each.get("key")): each for each in ours if self._is_mine(each)}

    def _is_mine(self, customer: Mapping[str, Any]) -> bool:
        return self.name in json.dumps(customer)

    def by_hand(self, key: str, *subjects: str, **fields: object) -> dict[str, Any]:
        """Create a customer as a person does, without syncd."""
        if self.server.v1:
            body = {"key": key, "name": key, "usageAttribution": {"subjectKeys": list(subjects)}, **fields}
            return self.server.made("POST", "/api/v1/customers", body)
        body = {"key": key, "name": key, "usage_attribution": {"subject_keys": list(subjects)}, **fields}
        return self.server.made("POST", f"{self.server.v3_path}/customers", body)

    def eventually(self, probe: Callable[[], _T], what: str, seconds: float | None = None) -> _T:
        """Return the first true answer; raises Differs after the time that an event may take."""
        limit = self.arrival.total_seconds() if seconds is None else seconds
        deadline = time.monotonic() + limit
        while not (found := probe()):
            if time.monotonic() > deadline:
                raise Differs(f"{what}: not within {limit:.0f} s, last seen {found!r}")
            time.sleep(0.1)
        return found
