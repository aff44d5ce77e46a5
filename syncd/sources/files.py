"""Sources that need no network: files of Kong and decK, lists of applications, static subjects.

Kong's declarative file (kong.yml, DB-less mode). A consumer without an `id` gets the one that Kong assigns,
as recorded from a real Kong and computed in kong/db/schema/others/declarative_config.lua:
uuid5(uuid5(namespace, "consumers"), username). Kong assigns a random id at each load to a consumer with
neither id nor username; its id is "" here. The file is read as Kong reads it: JSON if it is JSON, else YAML
without dates.

decK puts its files into a database, where Kong assigns a random id to each consumer without one: its id is
"" here, too. Its files are known by the keys that only decK has, and read as decK reads them
(docs.konghq.com/deck, go-database-reconciler/pkg/file): ``${{ env "DECK_X" }}`` is replaced wherever it
stands, by variables that begin with DECK_; the tags of `_info.select_tags` are on all entities; a plugin's
`_config` names one of `_plugin_configs`.

Dev Portal applications come from a file in the format of Konnect's list: ``GET
/v3/portals/{portalId}/applications`` answers ``{"data": [...], "meta": {"page": {"total": n}}}``
(konnect-portal-management-v3.yaml, ListApplicationsResponse). A file with fewer applications than `total` is
only one of several pages, which is an error.

Static subjects are named in the configuration, for usage that does not pass through Kong.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from openmeter_plugin.units import plural
from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.core.text_yaml import YamlError, parse_as_kong
from syncd.sources.base import anonymous_reference, tags, text
from syncd.sources.konnect import application, total

_NAMESPACE = uuid.uuid5(uuid.UUID("fd02801f-0957-4a15-a55a-c8d9606f30b5"), "consumers")
_DECK_KEYS = frozenset({"_info", "_konnect", "_plugin_configs"})
"""Top-level keys that decK has and Kong refuses."""
_TEMPLATE = "${{"
_DECK_ENV = re.compile(r"""\$\{\{\s*env\s+["']([A-Za-z0-9_]+)["']\s*\}\}""")


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
        content = self._content()
        document = self.document(content)
        is_deck = _DECK_ENV.search(content) is not None or not _DECK_KEYS.isdisjoint(document)
        try:
            anonymous = set(_anonymous(document, _objects(document.get("_plugin_configs"))))
        except RecursionError:
            raise SourceError(self.name, f"{self.path} is nested too deeply, or contains itself") from None
        listed = document.get("consumers") or []
        if not isinstance(listed, list):
            raise SourceError(self.name, "consumers is not a list")
        common = tags({"tags": _objects(document.get("_info")).get("select_tags")}, self.name, "_info")
        return [
            self._principal(item, index, anonymous, common, is_deck=is_deck)
            for index, item in enumerate(listed)
        ]

    def document(self, content: str | None = None) -> dict[str, object]:
        """Return the whole file as Kong or decK reads it; raises SourceError."""
        document = self._parsed(_with_environment(self._content() if content is None else content))
        # An empty or unrelated file must not count as "no consumers".
        if not isinstance(document, dict) or "_format_version" not in document:
            raise SourceError(self.name, f"{self.path} is not a declarative file: it has no _format_version")
        return document

    def _content(self) -> str:
        try:
            return self.path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise SourceError(self.name, f"cannot read {self.path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SourceError(self.name, f"{self.path} is not UTF-8") from None

    def _parsed(self, content: str) -> object:
        if content.lstrip().startswith("{"):
            try:
                return cast("object", json.loads(content))
            except (ValueError, RecursionError):
                pass  # YAML in flow style may begin like that
        try:
            return parse_as_kong(content).value
        except YamlError as error:
            raise SourceError(self.name, f"{self.path} is not YAML: {error}{_unset(content)}") from None

    def _principal(
        self, item: object, index: int, anonymous: set[str], common: tuple[str, ...], *, is_deck: bool
    ) -> Principal:
        what = f"consumers[{index}]"
        if not isinstance(item, dict):
            raise SourceError(self.name, f"{what} is not a mapping")
        tagged = tags(item, self.name, what)
        for part, value in ((name, item.get(name)) for name in ("id", "username", "custom_id", "tags")):
            if _TEMPLATE in str(value):
                raise SourceError(self.name, f"{what}: {part} has a template of decK's{_unset(str(value))}")
        username, custom_id, identity = (
            text(item, field, self.name, what, ". Put its value, or the whole template, in quotes")
            for field in ("username", "custom_id", "id")
        )
        if not (username or custom_id):
            raise SourceError(
                self.name, f"{what} has neither username nor custom_id; Kong would refuse the file"
            )
        if identity is None:
            identity = consumer_id(username) if username and not is_deck else ""
        return Principal(
            kind="consumer",
            id=identity,
            source=self.name,
            username=username,
            custom_id=custom_id,
            tags=tuple(dict.fromkeys((*tagged, *common))),
            anonymous=bool({identity, username} & anonymous),
        )


def _with_environment(content: str) -> str:
    """Return the text with decK's references replaced; those without a value stay as they are."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return os.environ.get(name, match[0]) if name.startswith("DECK_") else match[0]

    return _DECK_ENV.sub(value, content)


def _unset(text: str) -> str:
    """Return what to do about templates that are still there, for the end of a message."""
    if _TEMPLATE not in text:
        return ""
    name = _DECK_ENV.search(text)
    if name is None:
        return '. Of decK\'s templates, only ${{ env "DECK_..." }} is supported here'
    return (
        f": set the environment variable {name[1]} for syncd, as for decK"
        if name[1].startswith("DECK_")
        else f": decK replaces only variables that begin with DECK_, not {name[1]}"
    )


def plugin_config(plugin: Mapping[str, object], shared: Mapping[str, object]) -> Mapping[str, object]:
    """Return the configuration of a plugin in a file, with what it shares as far as the file has that.

    decK lets plugins share a configuration: `_config` names one of `_plugin_configs`, of which a plugin's own
    fields replace those of the same name (fillPluginConfig in pkg/file/builder.go of go-database-reconciler).
    """
    return {**_objects(shared.get(str(plugin.get("_config")))), **_objects(plugin.get("config"))}


def _objects(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _anonymous(node: object, configs: Mapping[str, object]) -> Iterator[str]:
    """Yield the anonymous consumers of all plugins: global, and of services, routes, consumers."""
    if isinstance(node, dict):
        plugins = node.get("plugins")
        for plugin in plugins if isinstance(plugins, list) else ():
            if name := anonymous_reference({"config": plugin_config(_objects(plugin), configs)}):
                yield name
        for value in node.values():
            yield from _anonymous(value, configs)
    elif isinstance(node, list):
        for value in node:
            yield from _anonymous(value, configs)


@dataclass(frozen=True, slots=True)
class ApplicationsFile:
    """A JSON file with the applications of a portal."""

    path: Path
    name: str = "applications-file"

    def fingerprint(self) -> None:
        """Return None: a file is read in each run."""

    def read(self) -> Sequence[Principal]:
        """Return the applications."""
        document = self._document()
        listed = document.get("data")
        if not isinstance(listed, list):
            raise SourceError(self.name, f"{self.path} has no list `data` as in Konnect's answer")
        principals = [self._principal(item, index) for index, item in enumerate(listed)]
        self._require_complete(document, len({principal.id for principal in principals}))
        return principals

    def _document(self) -> dict[str, object]:
        try:
            document = json.loads(self.path.read_bytes())
        except OSError as error:
            raise SourceError(self.name, f"cannot read {self.path}: {error.strerror}") from None
        except ValueError as error:
            raise SourceError(self.name, f"{self.path} is not JSON: {error}") from None
        except RecursionError:
            raise SourceError(self.name, f"{self.path} is not JSON: it is nested too deeply") from None
        if not isinstance(document, dict):
            raise SourceError(self.name, f"{self.path} is not a JSON object")
        return document

    def _require_complete(self, document: dict[str, object], found: int) -> None:
        wanted = total(document)
        if wanted is not None and wanted > found:
            raise SourceError(
                self.name,
                f"{self.path} has {found} of {plural(wanted, 'application')} (meta.page.total);"
                " put all pages into `data`",
            )

    def _principal(self, item: object, index: int) -> Principal:
        if not isinstance(item, dict):
            raise SourceError(self.name, f"data[{index}] is not an object")
        return application(item, self.name, f"data[{index}]")


@dataclass(frozen=True, slots=True)
class StaticSubject:
    """A subject by its own key; `customer` is the key of its customer, None for one of its own."""

    key: str
    name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    customer: str | None = None


@dataclass(frozen=True, slots=True)
class Static:
    """The subjects of one ``type: static`` entry."""

    subjects: tuple[StaticSubject, ...]
    name: str = "static"

    def fingerprint(self) -> None:
        """Return None: reading costs nothing."""

    def read(self) -> Sequence[Principal]:
        """Return the subjects as principals."""
        return [
            Principal(
                kind="static",
                id=subject.key,
                source=self.name,
                username=subject.name,
                metadata=subject.metadata,
                customer=subject.customer,
            )
            for subject in self.subjects
        ]
