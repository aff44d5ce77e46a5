"""Words for what pydantic finds wrong in the configuration: the setting, its line, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from syncd.config.sources import SOURCE_TYPES
from syncd.config.variables import PREFIX, models_in, place, suggested, variables_of
from syncd.core.text_yaml import Document

_TYPES = ", ".join(sorted(SOURCE_TYPES))
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": "must be 1 to 63 letters, digits, dots, dashes and underscores, and"
    " begin with a letter or a digit",
    r"^[a-z]{2,8}$": "must be a region such as us or eu",
    r"^[^,/]+$": "must not contain a comma or a slash",
    r"^[A-Z]{3}$": "must be a currency code of three capitals, such as EUR",
}
_WORDS: Mapping[str, str] = {
    "missing": "is required",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of a usual size",
    "int_from_float": "must be a whole number",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
    "path_type": "must be a path",
    "union_tag_not_found": f"a source needs a type: {_TYPES}",
    "recursion_loop": "contains itself",
}
_WITH_CONTEXT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "literal_error": lambda context: f"must be {context['expected']}",
    "enum": lambda context: f"must be {context['expected']}",
    "greater_than_equal": lambda context: f"must be at least {context['ge']}",
    "less_than_equal": lambda context: f"must be at most {context['le']}",
    "too_short": lambda context: f"needs at least {_counted(context['min_length'], 'entry', 'entries')}",
    "string_too_long": lambda context: f"must have at most {context['max_length']} characters",
    "string_too_short": lambda _: "must not be empty",
    "string_pattern_mismatch": lambda context: _PATTERNS.get(
        context["pattern"], f"must match {context['pattern']}"
    ),
    "union_tag_invalid": lambda context: _unknown_type(str(context["tag"])),
}


def explain(
    error: ValidationError, model: type[BaseModel], document: Document, environment: Mapping[str, str]
) -> list[str]:
    """Return a line for each fault, in the order of the file; never the value, which may be a secret."""
    faults = error.errors(include_url=False, include_input=False)
    return [text for _, text in sorted(_lines(faults, model, document, environment), key=itemgetter(0))]


def _lines(
    faults: list[ErrorDetails], model: type[BaseModel], document: Document, environment: Mapping[str, str]
) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield each fault after its position."""
    set_here = {name.upper(): name for name in environment if name.upper().startswith(PREFIX)}
    for fault in faults:
        if _follows(fault, faults):
            continue
        path = tuple(part for part in fault["loc"] if part not in SOURCE_TYPES)
        variable = PREFIX + "__".join(str(part) for part in path).upper()
        words = _words(fault)
        if variable in set_here:
            if fault["type"] == "extra_forbidden":
                words += suggested(variable, model)
            yield (0, 0), f"{set_here[variable]} (environment): {words}"
            continue
        if fault["type"] == "extra_forbidden":
            words += _similar(str(path[-1]), model, fault["loc"][:-1])
        position = document.position(path)
        index = str(next((part for part in path if isinstance(part, int)), 0))
        can_be_set = variable in set(variables_of(model, index=index)) and "SYNCD_" not in words
        hint = f" (environment: {variable})" if can_be_set else ""
        at = f"line {position[0]}, column {position[1]}: " if position else ""
        yield position or (0, 0), f"{at}{place(path) or 'settings'}: {words}{hint}"


def _follows(fault: ErrorDetails, faults: list[ErrorDetails]) -> bool:
    """Return whether a fault is only that a list lacks the entries that other faults are about."""
    depth = len(fault["loc"])
    return fault["type"] == "too_short" and any(
        other["loc"][:depth] == fault["loc"] and len(other["loc"]) > depth for other in faults
    )


def _words(fault: ErrorDetails) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return "there is no such setting"
    if kind in _WITH_CONTEXT:
        return _WITH_CONTEXT[kind](context)
    return _WORDS.get(kind) or fault["msg"].removeprefix("Value error, ")


def _similar(name: str, model: type[BaseModel], where: tuple[int | str, ...]) -> str:
    """Return a question for the setting that was probably meant, else the settings that there are."""
    fields = sorted(_fields(model, where))
    close = difflib.get_close_matches(name.lower(), fields, 1)
    return f"; did you mean `{close[0]}`?" if close else f"; there are {', '.join(fields)}" if fields else ""


def _fields(model: type[BaseModel], where: tuple[int | str, ...]) -> set[str]:
    """Return the settings of the section at a path; the path names the type of a source after its number."""
    models = [model]
    for part in where:
        if part in SOURCE_TYPES:
            models = [one for one in models if part in str(one.model_fields["type"].annotation)]
        elif isinstance(part, str):
            fields = [one.model_fields[part] for one in models if part in one.model_fields]
            models = [inner for field in fields for inner in models_in(field.annotation)]
    return {name for one in models for name in one.model_fields}


def _unknown_type(given: str) -> str:
    close = difflib.get_close_matches(given, SOURCE_TYPES, 1, 0.5)
    question = f"; did you mean {close[0]}?" if close else "."
    return f"there is no such type of source{question} The types: {_TYPES}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
