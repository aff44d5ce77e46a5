"""The tables of docs/plugin-settings.md and docs/syncd-settings.md.

The plugin's are made of what Kong is told of each setting, syncd's of the models that check them.
`python -m tests.settings_reference` writes them into the pages; tests hold that they are up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.config.schema import FIELDS
from tests import syncd_settings

PAGE: Final = Path(__file__).parents[1] / "docs" / "plugin-settings.md"
SYNCD_PAGE: Final = PAGE.with_name("syncd-settings.md")

_BLOCK: Final = re.compile(r"(<!-- settings: (\S+) -->\n)(.*?)(<!-- end of settings -->\n)", re.DOTALL)


def records() -> dict[str, list[dict[str, Any]]]:
    """Return the fields of each record by its name; `config` is the whole, a list's element is `name[]`."""
    found: dict[str, list[dict[str, Any]]] = {}

    def walk(name: str, fields: list[dict[str, Any]]) -> None:
        found[name] = fields
        for field in fields:
            ((inner_name, inner),) = field.items()
            prefix = "" if name == "config" else f"{name}."
            element = inner.get("elements", {})
            if inner["type"] == "record":
                walk(f"{prefix}{inner_name}", inner["fields"])
            elif element.get("type") == "record":
                walk(f"{prefix}{inner_name}[]", element["fields"])

    walk("config", FIELDS)
    return found


def table(fields: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the fields."""
    lines = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
    for field in fields:
        ((name, described),) = field.items()
        cells = (f"`{name}`", _type(described), _default(described), _meaning(described))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """Return the page with its tables made anew."""
    described = records()
    return _BLOCK.sub(lambda match: f"{match[1]}{table(described[match[2]])}{match[4]}", page)


def written_syncd(page: str) -> str:
    """Return the page of syncd's settings with its tables made anew."""
    found = syncd_settings.sections()
    return _BLOCK.sub(
        lambda match: f"{match[1]}{syncd_settings.table(found[match[2]])}{match[4]}",
        page,
    )


def blocks(page: str) -> list[str]:
    """Return the names of the records that the page has a table for."""
    return [match[2] for match in _BLOCK.finditer(page)]


def _type(described: dict[str, Any]) -> str:
    kind = described["type"]
    if kind == "array":
        kind = f"list of {described['elements']['type']}s"
    allowed = described.get("one_of") or described.get("elements", {}).get("one_of")
    if allowed:
        return f"{kind}: " + ", ".join(f"`{value}`" for value in allowed)
    if "between" in described:
        low, high = described["between"]
        return f"{kind}, {low} to {high}"
    if "gt" in described:
        return f"{kind} over {described['gt']}"
    if "len_max" in described:
        return f"{kind} of {described.get('len_min', 0)} to {described['len_max']} characters"
    return str(kind)


def _default(described: dict[str, Any]) -> str:
    if described.get("required"):
        return "required"
    return f"`{json.dumps(described['default'])}`" if "default" in described else ""


def _meaning(described: dict[str, Any]) -> str:
    notes = {
        "referenceable": "May be a vault reference.",
        "encrypted": "Encrypted in the database where Kong can.",
    }
    return " ".join([described["description"], *(notes[mark] for mark in notes if described.get(mark))])


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    SYNCD_PAGE.write_text(written_syncd(SYNCD_PAGE.read_text()))
