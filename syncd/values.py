"""Immutable values of which there are hundreds of thousands.

mypy refuses to change them, as it does with frozen dataclasses. These are not guarded at run time
as well: that doubles the time to make one, and a plan of 100,000 principals makes half a million.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_C = TypeVar("_C")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(kind: type[_C]) -> type[_C]:
    """Make a class a dataclass of values."""
    return dataclass(slots=True, unsafe_hash=True)(kind)
