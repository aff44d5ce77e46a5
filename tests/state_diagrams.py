"""The state diagrams of docs/development.md, made of the tables that the code follows.

`python -m tests.state_diagrams` writes them into the page; a test holds that they are up to date.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Final

from openmeter_plugin.kong.states import CONNECTION, INSTANCE, InstanceState, State

PAGE: Final = Path(__file__).parents[1] / "docs" / "development.md"

_Step = tuple[StrEnum, StrEnum, StrEnum]
_BLOCK: Final = re.compile(r"(<!-- states: (\S+) -->\n)(.*?)(<!-- end of states -->\n)", re.DOTALL)


def steps(name: str) -> tuple[StrEnum, list[_Step]]:
    """Return the first state of a table, and its steps: state, signal, following state."""
    if name == "connection":
        return State.IDLE, [(s, signal, f) for signal, row in CONNECTION.items() for s, f in row.items()]
    return InstanceState.UNKNOWN, [(s, signal, f) for signal, row in INSTANCE.items() for s, f in row.items()]


def diagram(name: str) -> str:
    """Return a Mermaid diagram of the transitions; signals between the same two states share an arrow."""
    first, found = steps(name)
    arrows: dict[tuple[str, str], list[str]] = {}
    for before, signal, after in found:
        arrows.setdefault((before.value, after.value), []).append(signal.value)
    lines = ["```mermaid", "stateDiagram-v2", f"  [*] --> {first.value}"]
    for (state, following), signals in arrows.items():
        lines.append(f"  {state} --> {following} : {', '.join(signals)}")
    return "\n".join([*lines, "```", ""])


def written(page: str) -> str:
    """Return the page with its diagrams made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{diagram(match[2])}{match[4]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
