"""Weighted units: quantities such as credits, computed from the tokens of an AI call by an expression.

An expression is arithmetic over the call's counts, such as `input + 0.1 * cache_read + 4 * output`. It is
checked and parsed once, when the instance starts; simpleeval evaluates it without access to anything else.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from simpleeval import SimpleEval

NAMES: Final = ("input", "cache_read", "cache_write", "output", "reasoning", "cost")
"""What an expression can use: the call's tokens by type, and its cost as Kong logged it (0 if it did not)."""

_OPERATORS: Final[Mapping[type[ast.AST], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}
_FUNCTIONS: Final[Mapping[str, Any]] = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor}

_DIGITS: Final = 9
"""Decimal places of a result: 0.1 * 3 is 0.3 in an event, not 0.30000000000000004."""

_MAX_LENGTH: Final = 500


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's name, which is its event property, and its parsed expression."""

    name: str
    expression: str
    _parsed: ast.AST = field(repr=False, compare=False)

    def quantity(self, counts: Mapping[str, float]) -> float | None:
        """Return the quantity for the counts of a call, or None where it has none (a division by 0)."""
        evaluator = SimpleEval(operators=dict(_OPERATORS), functions=dict(_FUNCTIONS), names=dict(counts))
        try:
            value = float(evaluator.eval(self.expression, previously_parsed=self._parsed))
        except (ArithmeticError, ValueError, TypeError):
            return None
        if not math.isfinite(value):
            return None
        rounded = round(value, _DIGITS)
        return int(rounded) if rounded.is_integer() else rounded


def compile_unit(name: str, expression: str) -> Unit:
    """Return the unit; raises ValueError that names the column of what is wrong with the expression."""
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"an expression has at most {_MAX_LENGTH} characters, this one {len(expression)}")
    text = expression.strip()
    try:
        parsed = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"column {error.offset or 1}: this is no arithmetic expression") from None
    except (RecursionError, MemoryError, ValueError):
        raise ValueError("column 1: this is no arithmetic expression") from None
    for node in ast.walk(parsed):
        _check(node)
    return Unit(name, text, parsed)


def _check(node: ast.AST) -> None:
    """Raise ValueError for anything that is not arithmetic over the known names."""
    where = f"column {getattr(node, 'col_offset', 0) + 1}"
    match node:
        case ast.Name(id=name) if name not in NAMES and name not in _FUNCTIONS:
            raise ValueError(f"{where}: {name!r} is unknown, an expression can use {', '.join(NAMES)}")
        case ast.Constant(value=value) if type(value) not in (int, float):
            raise ValueError(f"{where}: {value!r} is no number")
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            pass
        case ast.Call():
            raise ValueError(f"{where}: the functions are {', '.join(_FUNCTIONS)}")
        case ast.BinOp(left=left, op=op) if type(op) not in _OPERATORS:
            raise ValueError(f"after column {left.end_col_offset}: the operators are + - * / and parentheses")
        case ast.UnaryOp(op=op) if type(op) not in _OPERATORS:
            raise ValueError(f"{where}: the operators are + - * / and parentheses")
        case ast.BinOp() | ast.UnaryOp() | ast.Name() | ast.Constant() | ast.Load():
            pass
        case ast.operator() | ast.unaryop():
            pass  # checked with its operands, which have a column
        case _:
            raise ValueError(f"{where}: only arithmetic is possible here")
