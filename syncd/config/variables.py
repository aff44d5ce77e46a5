"""The environment: its variables for settings, and ``${VAR}`` in the file."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from syncd.core.errors import ConfigError

PREFIX = "SYNCD_"
_NOT_SETTINGS = frozenset({"SYNCD_CONFIG", "SYNCD_LOG_LEVEL", "SYNCD_SANDBOX_TOKEN"})
"""Read by the command line."""
# Kubernetes and Docker set these in each container for a service `syncd`, or `syncd-...`, beside it.
_OF_SERVICES = re.compile(
    r"SYNCD_(?:.*_)?(?:SERVICE_(?:HOST|PORT(?:_.*)?)|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)

# `${{`, a template of decK's, is refused as well: it is not expanded here.
_REFERENCE = re.compile(r"(\$?)\$\{([^}]*)\}?")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


def models_in(hint: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in a type: itself, or those in its list, union or `Annotated`."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    elif get_origin(hint) in (Annotated, Union, types.UnionType, tuple):
        for part in get_args(hint):
            yield from models_in(part)


def is_list(hint: Any) -> bool:
    """Return whether a type is a list of entries."""
    if get_origin(hint) is Annotated:
        return is_list(get_args(hint)[0])
    return get_origin(hint) is tuple


def variables_of(model: type[BaseModel], prefix: str = PREFIX, index: str = "0") -> Iterator[str]:
    """Yield the environment variables of all settings; `index` stands for the position in a list."""
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        inner = list(models_in(field.annotation))
        listed = is_list(field.annotation)
        if listed and prefix != PREFIX:
            yield variable
            continue
        if not inner:
            yield variable
        for part in inner:
            yield from variables_of(part, f"{variable}__{index}__" if listed else f"{variable}__", index)


def refuse_unknown(environment: Mapping[str, str], model: type[BaseModel]) -> None:
    """Raise ConfigError for a variable that begins with SYNCD_ and is not one of a section of settings.

    Those of a section, pydantic refuses.
    """
    sections = {name.upper() for name in model.model_fields}
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in _NOT_SETTINGS or _OF_SERVICES.fullmatch(upper):
            continue
        if upper.removeprefix(PREFIX).partition("__")[0] not in sections:
            raise ConfigError(
                f"environment variable {name}: there is no such setting{suggested(upper, model)}"
            )


def unreadable(problem: str, environment: Mapping[str, str]) -> str:
    """Return words for pydantic's complaint that the variables of one section cannot be read."""
    named = re.search(r'field "(\w+)"', problem)
    begin = f"{PREFIX}{named[1].upper() if named else ''}"
    names = sorted(name for name in environment if name.upper().startswith(begin))
    return (
        f"environment variable {' or '.join(names)} cannot be read: lists and sections are JSON there,"
        ' such as ["a", "b"]'
    )


def suggested(variable: str, model: type[BaseModel]) -> str:
    """Return a question for the variable that was probably meant, if there is one."""
    numbers = re.findall(r"__(\d+)__", variable)
    known = variables_of(model, index=numbers[0] if numbers else "0")
    close = difflib.get_close_matches(variable, set(known), 1, 0.8)
    return f"; did you mean {close[0]}?" if close else ""


def expanded(value: object, environment: Mapping[str, str], path: tuple[str | int, ...] = ()) -> object:
    """Return the value with each ``${VAR}`` in its texts replaced; a ConfigError names the setting.

    ``${VAR:-default}`` has a default, ``$${VAR}`` stands for the text ``${VAR}``.
    """
    if isinstance(value, dict):
        return {name: expanded(inner, environment, (*path, str(name))) for name, inner in value.items()}
    if isinstance(value, list):
        return [expanded(inner, environment, (*path, index)) for index, inner in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    return _REFERENCE.sub(lambda match: _expanded_one(match, environment, path), value)


def _expanded_one(match: re.Match[str], environment: Mapping[str, str], path: tuple[str | int, ...]) -> str:
    if match[1]:
        return match[0][1:]
    name = _NAME.fullmatch(match[2])
    if name is None or not match[0].endswith("}"):
        raise ConfigError(
            f"{place(path)}: `${{` must begin a variable, as in ${{NAME}}; write $${{ for the text"
        )
    found = environment.get(name[1]) or name[2]
    if found is None:
        raise ConfigError(
            f"{place(path)}: the environment variable {name[1]} is not set, or empty. Set it, give a default"
            f" (${{{name[1]}:-...}}), or write $${{{name[1]}}} for the text"
        )
    return found


def place(path: tuple[str | int, ...]) -> str:
    """Return the name of a setting: ``sources[0].url``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
