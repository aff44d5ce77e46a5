"""Assigning a subject to a customer: what to paste, and where; and the rows of the mapping file.

A CSV file gets the row appended in one step: readers see the file with the row or without it, and never with
a row that could not be read.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from openmeter_plugin.metering.rules import SubjectPrefixes
from syncd.config.settings import Config
from syncd.config.sources import StaticSource
from syncd.core.errors import ConfigError
from syncd.mapping.mapping_file import DELIMITERS, read_mapping_file


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False, default_flow_style=False)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What assigns a subject; `row` is what the dashboard may append to the mapping file itself."""

    text: str
    snippet: str = ""
    row: dict[str, str] | None = None


def instruction(
    config: Config, subject: str, customer: str, *, known: bool, application: bool = False
) -> Instruction:
    """Return how to assign a subject to the customer with this key; `known`: a source names the subject."""
    if not subject:
        return Instruction("Events without a subject belong to no customer. Find out what sends them.")
    if not known:
        return _static(config, subject, customer)
    mapping = config.mapping
    if mapping.group_by == "file" and mapping.file is not None:
        return _row(config, subject, customer)
    if mapping.group_by == "tag" and not application:
        text = "Give the consumer this tag in Kong, instead of any other customer: tag."
        return Instruction(text, _yaml({"tags": [f"customer:{customer}"]}))
    if mapping.group_by == "custom_id":
        text = "Give the consumer this custom_id in Kong; consumers that share it share a customer."
        return Instruction(text, _yaml({"custom_id": customer}))
    return Instruction(
        f"With mapping.group_by: {mapping.group_by}, no single principal can be assigned. With"
        " mapping.group_by: file, a file assigns each."
    )


def _static(config: Config, subject: str, customer: str) -> Instruction:
    entry = {"key": subject, "customer": customer}
    if any(isinstance(source, StaticSource) for source in config.sources):
        text = (
            "No source names this subject. Add it to the subjects of the static source in syncd.yaml, then"
            " reload (SIGHUP)."
        )
        return Instruction(text, _yaml([entry]))
    text = "No source names this subject. Add this to sources in syncd.yaml, then reload (SIGHUP)."
    return Instruction(text, _yaml([{"type": "static", "subjects": [entry]}]))


def _row(config: Config, subject: str, customer: str) -> Instruction:
    mapping = config.mapping
    who = who_of(subject, mapping.subject_field, mapping.subject_prefixes.compiled())
    if mapping.file is None or who is None:
        return Instruction(
            "The subject does not say which principal it is. Find it at its source, then add a row for it to"
            f" {mapping.file}."
        )
    row = who.row(customer)
    try:
        snippet = row_text(row, mapping.file)
    except ConfigError as error:
        return Instruction(str(error))
    text = f"Add this row to {mapping.file}. Each run reads the file again."
    return Instruction(text, snippet, row if mapping.edit_file else None)


_writing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Who:
    """A principal as a row names it; without an id it is named by username."""

    kind: str
    id: str | None
    username: str | None

    def row(self, customer: str) -> dict[str, str]:
        """Return the row that assigns it to a customer, without empty columns."""
        named = {"id": self.id} if self.id else {"username": self.username or ""}
        return {"kind": self.kind, **named, "customer": customer}


def who_of(subject: str, field: str, prefixes: SubjectPrefixes) -> Who | None:
    """Return the principal that sends a subject; None if the subject does not say."""
    for kind, prefix in (("application", prefixes.application), ("consumer", prefixes.consumer)):
        if prefix and subject.startswith(prefix) and len(subject) > len(prefix):
            return Who(kind, subject.removeprefix(prefix), None)
    return Who("consumer", None, subject) if field == "username" and subject else None


def row_text(row: Mapping[str, str], path: Path) -> str:
    """Return a row as it is pasted into this file; raises ConfigError if the file cannot be read."""
    if path.suffix.lower() != ".csv":
        return yaml.safe_dump([dict(row)], allow_unicode=True, sort_keys=False)
    header, delimiter = _header(_read(path))
    return _csv_line(row, header, delimiter)


def append_row(row: Mapping[str, str], path: Path) -> None:
    """Append a row to a CSV file; raises ConfigError, which says why the file stays as it was."""
    if path.suffix.lower() != ".csv":
        raise ConfigError(f"{path} is no CSV file. Paste the entry by hand")
    real = path.resolve()
    with _writing:
        before = _read(real)
        header, delimiter = _header(before)
        newline = "\r\n" if "\r\n" in before else "\n"
        ended = before if before.endswith("\n") else before + newline
        text = ended + _csv_line(row, header, delimiter).rstrip("\n") + newline
        _replace(real, before, text)


def _replace(path: Path, before: str, text: str) -> None:
    """Put the text in the file's place if it can be read, and if the file is still as it was."""
    draft: Path | None = None
    try:
        mode = path.stat().st_mode & 0o7777
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".csv")
        draft = Path(name)
        with os.fdopen(number, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(mode)
        read_mapping_file(draft)
        if _read(path) != before:
            raise ConfigError(f"{path} was changed in the meantime. Try again")
        draft.replace(path)
        draft = None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Paste the row by hand") from None
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()


def _read(path: Path) -> str:
    try:
        # Not utf-8-sig: the file keeps its byte order mark.
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"mapping.file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"mapping.file: {path} is not UTF-8") from None


def _header(text: str) -> tuple[list[str], str]:
    first = text.removeprefix("\ufeff").partition("\n")[0].rstrip("\r")
    delimiter = next((one for one in DELIMITERS if one in first), ",")
    names = next(csv.reader([first], delimiter=delimiter), [])
    return [name.strip() for name in names], delimiter


def _csv_line(row: Mapping[str, str], header: list[str], delimiter: str) -> str:
    if lacking := [name for name in row if name not in header and (name, row[name]) != ("kind", "consumer")]:
        raise ConfigError(f"mapping.file: line 1 has no column {lacking[0]!r}. Add it, then try again")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow([row.get(name, "") for name in header])
    return text.getvalue()
