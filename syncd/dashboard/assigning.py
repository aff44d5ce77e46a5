"""Instructions that assign a subject to a customer: what to paste, and where."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from syncd.config.settings import Config
from syncd.config.sources import StaticSource
from syncd.core.errors import ConfigError
from syncd.runs import mapping_rows


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
    who = mapping_rows.who_of(subject, mapping.subject_field, mapping.subject_prefixes.compiled())
    if mapping.file is None or who is None:
        return Instruction(
            "The subject does not say which principal it is. Find it at its source, then add a row for it to"
            f" {mapping.file}."
        )
    row = who.row(customer)
    try:
        snippet = mapping_rows.as_text(row, mapping.file)
    except ConfigError as error:
        return Instruction(str(error))
    text = f"Add this row to {mapping.file}. Each run reads the file again."
    return Instruction(text, snippet, row if mapping.edit_file else None)
