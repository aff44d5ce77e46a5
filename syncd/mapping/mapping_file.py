"""The mapping file: the customer of each principal, and the details that the customer is created with.

CSV with a header, separated by commas, semicolons (as spreadsheets in much of Europe save it) or tabs; or
YAML with a list of mappings, in which all values are text as written: a customer ``0017`` is not ``15``. The
columns (all but `kind` may be left empty):

kind            consumer or application; empty is consumer
id, username    the principal, by id or else by username
customer        the customer's key (mapping.group_by: file)
name, email, currency, description
billing_<part>  of the billing address: country, postal_code, state, city, line1, line2, phone_number
metadata.<key>  for example metadata.externalId
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from syncd.core.errors import ConfigError
from syncd.core.model import CustomerDetails
from syncd.core.ownership import RESERVED_KEYS
from syncd.core.text_yaml import YamlError, parse
from syncd.mapping.rules import Assignment

ADDRESS_PARTS = ("country", "postal_code", "state", "city", "line1", "line2", "phone_number")
_PLAIN = ("kind", "id", "username", "customer", "name", "email", "currency", "description")
_BILLING, _METADATA = "billing_", "metadata."
DELIMITERS = ",;\t"


def read_mapping_file(path: Path) -> tuple[Assignment, ...]:
    """Return the rows; raises ConfigError, which names the file and the place."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"mapping.file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"mapping.file: {path} is not UTF-8") from None
    rows = _csv_rows(text, path) if path.suffix.lower() == ".csv" else _yaml_rows(text, path)
    found = [_assignment(row, place) for place, row in rows]
    _refuse_duplicates(found)
    return tuple(found)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    header = text.partition("\n")[0]
    delimiter = next((one for one in DELIMITERS if one in header), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{path.name} line 1: column {twice[0]!r} is there twice; remove one of them")
        for name in filter(None, names):
            _check_column(name, f"{path.name} line 1")
        for row in reader:
            place = f"{path.name} line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{place}: the number of fields differs from that of the header")
            yield place, {name.strip(): value.strip() for name, value in row.items() if value.strip()}
    except csv.Error as error:
        raise ConfigError(f"{path.name} line {reader.line_num}: {error}") from None


def _yaml_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        document = parse(text)
    except YamlError as error:
        raise ConfigError(f"the mapping file {path} is not YAML: {error}") from None
    if not isinstance(document.value, list):
        raise ConfigError(f"the mapping file {path} must be a list of mappings")
    for index, (entry, line) in enumerate(zip(document.value, document.lines(), strict=True)):
        place = f"{path.name} line {line} (entry {index + 1})"
        if not isinstance(entry, dict):
            raise ConfigError(f"{place}: is not a mapping")
        yield place, dict(_flat(entry, place))


def _flat(entry: Mapping[object, object], place: str) -> Iterator[tuple[str, str]]:
    """Yield all fields, nested ones too, under the names of the columns."""
    for name, value in entry.items():
        prefix = {"metadata": _METADATA, "billing_address": _BILLING}.get(str(name))
        if prefix and isinstance(value, dict):
            yield from _flat({f"{prefix}{inner}": text for inner, text in value.items()}, place)
        elif isinstance(value, str):
            yield str(name), value
        elif value is not None:
            raise ConfigError(f"{place}: {name} must be text, not a list or a mapping")


def _assignment(row: Mapping[str, str], place: str) -> Assignment:
    for name in row:
        _check_column(name, place)
    kind = row.get("kind", "consumer")
    if kind not in ("consumer", "application"):
        raise ConfigError(f"{place}: kind is {kind!r}, not consumer or application")
    if not (row.get("id") or row.get("username")):
        raise ConfigError(f"{place}: names no principal; give id or username")
    return Assignment(
        kind="application" if kind == "application" else "consumer",
        place=place,
        id=row.get("id"),
        username=row.get("username"),
        customer=row.get("customer"),
        name=row.get("name"),
        details=CustomerDetails(
            email=row.get("email"),
            currency=row.get("currency"),
            description=row.get("description"),
            billing_address=_prefixed(row, _BILLING),
            metadata=_prefixed(row, _METADATA),
        ),
    )


def _check_column(name: str, place: str) -> None:
    """Raise ConfigError unless this is a column, or a field of YAML."""
    part = name.removeprefix(_BILLING)
    known = name in _PLAIN or (name != part and part in ADDRESS_PARTS) or name.startswith(_METADATA)
    if not known or not name.isprintable():
        raise ConfigError(f"{place}: unknown column {name!r}{_suggested(name)}")
    if name.removeprefix(_METADATA) in RESERVED_KEYS:
        raise ConfigError(f"{place}: cannot set {name}: it is reserved for syncd's own metadata")


def _suggested(name: str) -> str:
    known = (*_PLAIN, *(f"{_BILLING}{part}" for part in ADDRESS_PARTS))
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _prefixed(row: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _refuse_duplicates(rows: Iterable[Assignment]) -> None:
    seen: dict[tuple[str, str, str], Assignment] = {}
    for row in rows:
        identity = (row.kind, "id", row.id) if row.id else (row.kind, "username", row.username or "")
        other = seen.setdefault(identity, row)
        if other is not row:
            raise ConfigError(
                f"{other.place} and {row.place} are both about {row.kind} {row.id or row.username};"
                " remove one of them"
            )
