"""Consumers from Kong's declarative file (kong.yml, DB-less mode).

A consumer without an `id` gets the one that Kong assigns, as recorded from a real Kong and computed in
kong/db/schema/others/declarative_config.lua: uuid5(uuid5(namespace, "consumers"), username).
Kong assigns a random id at each load to a consumer with neither id nor username; its id is "" here.
If decK syncs the same file into a database, Kong assigns random ids; use the source kong-admin then.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.sources.base import anonymous_reference, tags, text

_NAMESPACE = uuid.uuid5(uuid.UUID("fd02801f-0957-4a15-a55a-c8d9606f30b5"), "consumers")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def consumer_id(username: str) -> str:
    """Return the id that a DB-less Kong assigns to a consumer without one."""
    return str(uuid.uuid5(_NAMESPACE, username))


@dataclass(frozen=True, slots=True)
class DeclarativeFile:
    """A kong.yml."""

    path: Path
    name: str = "declarative-file"

    def fingerprint(self) -> None:
        """Return None: a file is read in each run."""

    def read(self) -> Sequence[Principal]:
        """Return the consumers; those that any plugin in the file uses as `anonymous` are flagged."""
        document = self._document()
        anonymous = set(_anonymous(document))
        listed = document.get("consumers") or []
        if not isinstance(listed, list):
            raise SourceError(self.name, "consumers is not a list")
        return [self._principal(item, index, anonymous) for index, item in enumerate(listed)]

    def _document(self) -> dict[str, object]:
        try:
            # CSafeLoader constructs plain values only, as SafeLoader does, and is ten times faster.
            document = yaml.load(self.path.read_bytes(), Loader=_LOADER)  # noqa: S506
        except OSError as error:
            raise SourceError(self.name, f"cannot read {self.path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SourceError(self.name, f"{self.path} is not YAML: {error}") from None
        # An empty or unrelated file must not count as "no consumers".
        if not isinstance(document, dict) or "_format_version" not in document:
            raise SourceError(self.name, f"{self.path} is not a declarative file: it has no _format_version")
        return document

    def _principal(self, item: object, index: int, anonymous: set[str]) -> Principal:
        what = f"consumers[{index}]"
        if not isinstance(item, dict):
            raise SourceError(self.name, f"{what} is not a mapping")
        username = text(item, "username", self.name, what)
        custom_id = text(item, "custom_id", self.name, what)
        identity = text(item, "id", self.name, what)
        if not (username or custom_id):
            raise SourceError(
                self.name, f"{what} has neither username nor custom_id; Kong would refuse the file"
            )
        if identity is None:
            identity = consumer_id(username) if username else ""
        return Principal(
            kind="consumer",
            id=identity,
            source=self.name,
            username=username,
            custom_id=custom_id,
            tags=tags(item, self.name, what),
            anonymous=bool({identity, username} & anonymous),
        )


def _anonymous(node: object) -> Iterator[str]:
    """Yield the anonymous consumers of all plugins: global, and of services, routes, consumers."""
    if isinstance(node, dict):
        plugins = node.get("plugins")
        for plugin in plugins if isinstance(plugins, list) else ():
            if name := anonymous_reference(plugin):
                yield name
        for value in node.values():
            yield from _anonymous(value)
    elif isinstance(node, list):
        for value in node:
            yield from _anonymous(value)
