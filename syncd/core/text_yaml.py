"""YAML whose plain scalars are text, with the lines of its entries.

YAML 1.1 reads ``0017`` as 15, ``1_000`` as 1000, ``12:30`` as 750 and ``2024-02-01`` as a date. A key, a
subject or a tag that became a number names another principal, so here every scalar but null keeps its text;
the reader converts it to the type that it needs.

Refused, with the line: a second document, and a key that is there twice, which YAML forbids. (Of a file for
Kong the last one counts, as Kong itself takes it.)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import yaml

_BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Path = tuple[str | int, ...]
"""Where an entry is: the names and positions that lead to it."""


class YamlError(ValueError):
    """A text that is not the YAML we read; the message begins with the line, and repeats no value."""


class _TextLoader(_BASE):  # type: ignore[misc,valid-type]
    """Plain values only. Resolves null and `<<`; all other plain scalars are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own table
        first: [entry for entry in resolvers if entry[0].endswith((":null", ":merge"))]
        for first, resolvers in _BASE.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name is not None:
                raise YamlError(f"{_place(key.start_mark)}: {key.value} is there twice; remove one of them")
            if name is not None:
                seen.add(name)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


class _KongLoader(_BASE):  # type: ignore[misc,valid-type]
    """Plain values only. Resolves what Kong's lyaml does: numbers and booleans, but no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [entry for entry in resolvers if not entry[0].endswith((":timestamp", ":value"))]
        for first, resolvers in _BASE.yaml_implicit_resolvers.items()
    }


class Document:
    """A document: its `value`, and the line of each entry."""

    def __init__(self, value: object, root: yaml.Node | None) -> None:
        self.value = value
        self._root = root

    def lines(self) -> list[int]:
        """Return the line of each entry of a list."""
        return [line for _, _, (line, _column) in _entries(self._root)]

    def position(self, path: Path) -> tuple[int, int] | None:
        """Return line and column of an entry, or of the closest one around it that is there."""
        node, found = self._root, None
        for part in path:
            entry = next((entry for entry in _entries(node) if entry[0] == part), None)
            if entry is None:
                return found
            _, node, found = entry
        return found


def _entries(node: yaml.Node | None) -> Iterator[tuple[str | int, yaml.Node, tuple[int, int]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, value, (key.start_mark.line + 1, key.start_mark.column + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield index, value, (value.start_mark.line + 1, value.start_mark.column + 1)


def parse(content: bytes | str) -> Document:
    """Return the only document, with all scalars but null as text; raises YamlError."""
    return _parse(content, _TextLoader)


def parse_as_kong(content: bytes | str) -> Document:
    """Return the only document as Kong reads it: with numbers and booleans; raises YamlError."""
    return _parse(content, _KongLoader)


def _parse(content: bytes | str, kind: type[_TextLoader | _KongLoader]) -> Document:
    try:
        loader = kind(content)
        try:
            root = loader.get_single_node()
            return Document(loader.construct_document(root) if root is not None else None, root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError(_explain(error)) from None
    except UnicodeDecodeError:
        raise YamlError("it is not UTF-8") from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except YamlError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        # Constructors of PyYAML's let these out: `!!int x`, `!!timestamp 2023-02-30`.
        raise YamlError("a value does not fit its !!tag") from None


def _explain(error: yaml.YAMLError) -> str:
    """Return place and kind of the fault, never the text around it, which may be a token."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if isinstance(error, yaml.composer.ComposerError) and "single document" in str(error.context):
        return f"{_place(mark)}: a second document begins here; keep one" if mark else "it has two documents"
    text = str(problem or "it cannot be parsed")
    return f"{_place(mark)}: {text}" if mark else text


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
