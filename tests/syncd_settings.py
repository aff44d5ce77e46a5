"""Generator of the tables in docs/syncd-settings.md, from the models that check the settings."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from syncd.config.mapping import GroupTemplate, Template
from syncd.config.prices import Money, Quantity, Where
from syncd.config.sections import Dimensions, GatewayUrl, Host, default_state_dir
from syncd.config.settings import Config
from syncd.config.sources import StaticSubjectConfig, _AnySource
from syncd.config.types import Duration, HttpUrl, Label, Listen, Metadata

HEAD: Final = ("Setting", "Type", "Default", "Environment", "Meaning")

# Types by equality: `Annotated` types are equal if all of their parts are.
_NAMES: Final[tuple[tuple[Any, str], ...]] = (
    (Duration, "duration"),
    (HttpUrl, "URL"),
    (GatewayUrl, "URL or `unix:/path`"),
    (Host, "host"),
    (Label, "label"),
    (Template, "template"),
    (GroupTemplate, "template"),
    (Metadata, "map of strings"),
    (Money, "number"),
    (Quantity, "number above 0"),
    (Decimal, "number"),
    (Where, "map of strings or lists of strings"),
    (Dimensions, "map of lists of strings"),
    (SecretStr, "secret string"),
    (Listen, "host:port"),
    (Path, "path"),
    (date, "day"),
    (timedelta, "duration"),
    (str, "string"),
    (int, "integer"),
    (bool, "`true` or `false`"),
)


@dataclass(frozen=True)
class Setting:
    """A setting of a section: its name, its path in the file, its type and its field of the model."""

    name: str
    place: tuple[str, ...]
    hint: Any
    field: FieldInfo

    @property
    def variable(self) -> str | None:
        """The environment variable that sets it; None for lists within lists, which only the file can set."""
        if "[]" in self.place or "0" in self.place[2:]:
            return None
        if "0" in self.place and get_origin(self.hint) is tuple:
            return None
        return "SYNCD_" + "__".join(self.place).upper()

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """The cells of its row."""
        assert self.field.description, f"{'.'.join(self.place)} has no description below it"
        variable = f"`{self.variable}`" if self.variable else ""
        return (f"`{self.name}`", self.kind, self.default, variable, " ".join(self.field.description.split()))

    @property
    def kind(self) -> str:
        """Its type as a readable text."""
        limits = {type(limit): limit for limit in (*_limits(self.hint), *self.field.metadata)}
        kind = _kind(self.hint)
        if Ge in limits and Le in limits:
            return f"{kind}, {limits[Ge].ge} to {limits[Le].le}"
        return f"{kind}, at least {limits[Ge].ge}" if Ge in limits else kind

    @property
    def default(self) -> str:
        """Its default, "required" or nothing."""
        if self.field.default_factory is default_state_dir:
            return ""
        if get_origin(self.hint) is Literal and self.name == "type":
            return "required"
        if self.field.is_required():
            return "required"
        value = self.field.get_default(call_default_factory=True, validated_data={})
        if value is None or isinstance(value, BaseModel) or value in ((), {}):
            return ""
        if isinstance(value, Listen):
            return f"`{value.host}:{value.port}`"
        return f"`{_duration(value) if isinstance(value, timedelta) else _text(value)}`"


def sections() -> dict[str, list[Setting]]:
    """Return the settings of each section by its name; `settings` is the top level."""
    found: dict[str, list[Setting]] = {}
    _walk(found, "settings", (), Config)
    for source in get_args(_AnySource):
        kind = source.model_fields["type"].annotation.__args__[0]
        _walk(found, f"sources.{kind}", ("sources", "0"), source)
    found["sources.static.subjects"] = list(
        _settings(("sources", "0", "subjects", "[]"), StaticSubjectConfig)
    )
    return found


def table(settings: list[Setting]) -> str:
    """Return a Markdown table of the settings."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(setting.row for setting in settings)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _walk(found: dict[str, list[Setting]], name: str, place: tuple[str, ...], model: type[BaseModel]) -> None:
    found[name] = list(_settings(place, model))
    for setting in found[name]:
        inner = _model(setting.hint)
        if inner is None or inner is StaticSubjectConfig:
            continue
        listed = get_origin(setting.hint) is tuple
        _walk(found, ".".join(setting.place), (*setting.place, "0") if listed else setting.place, inner)


def _settings(place: tuple[str, ...], model: type[BaseModel]) -> Iterator[Setting]:
    hints = typing.get_type_hints(model, include_extras=True)
    # `type` first, then the required settings of a source.
    fields = sorted(
        model.model_fields.items(), key=lambda item: (item[0] != "type", not item[1].is_required())
    )
    for name, field in fields if "type" in model.model_fields else model.model_fields.items():
        yield Setting(name, (*place, name), hints[name], field)


def _model(hint: Any) -> type[BaseModel] | None:
    if get_origin(hint) in (Union, UnionType):
        hint = next((part for part in get_args(hint) if part is not type(None)), hint)
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return hint if isinstance(hint, type) and issubclass(hint, BaseModel) else None


def _kind(hint: Any) -> str:
    for known, name in _NAMES:
        if hint == known:
            return name
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        (inner,) = {_kind(argument) for argument in arguments if argument is not type(None)} or {"section"}
        return inner
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return (
            "list of sections" if _model(hint) or "Source" in str(hint) else f"list of {_kind(arguments[0])}s"
        )
    if origin is dict:
        return "map of strings"
    assert isinstance(hint, type), hint
    assert issubclass(hint, BaseModel), hint
    return "section"


def _limits(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        for part in get_args(hint)[1:]:
            yield from part.metadata if isinstance(part, FieldInfo) else (part,)
    elif get_origin(hint) in (Union, UnionType):
        for argument in get_args(hint):
            yield from _limits(argument)


def _duration(value: timedelta) -> str:
    seconds = int(value.total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: [{', '.join(names)}]" for name, names in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
