"""Weighted units: the arithmetic that is possible, and how anything else is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.metering.ai_events import UNIT_NAMES, compile_unit

COUNTS = {"input": 40.0, "cache_read": 3.0, "cache_write": 0.0, "output": 5.0, "reasoning": 15.0, "cost": 0.5}


@pytest.mark.parametrize(
    ("expression", "quantity"),
    [
        ("input + 0.1 * cache_read + 4 * (output + reasoning)", 120.3),
        ("0.1 * cache_read", 0.3),
        ("input", 40),
        ("-input + +output", -35),
        ("max(input, output) / 4", 10),
        ("ceil(cache_read / 2) + floor(cost)", 2),
        (" min(input, 7) ", 7),
        ("1.5", 1.5),
    ],
)
def test_an_expression_is_arithmetic_over_the_counts_of_a_call(expression: str, quantity: float) -> None:
    found = compile_unit("credits", expression).quantity(COUNTS)
    assert found == quantity
    assert type(found) is type(quantity)


@pytest.mark.parametrize(
    "expression", ["input / cache_write", "1e308 * 1e308 * input", "ceil(1e999 - 1e999)", "9" * 400]
)
def test_a_quantity_that_is_no_number_is_none(expression: str) -> None:
    assert compile_unit("credits", expression).quantity(COUNTS) is None


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("input + tokens", "column 9: 'tokens' is unknown, an expression can use input, cache_read"),
        ("input +", "this is no arithmetic expression"),
        ("input ** 2", "after column 5: the operators are + - * / and parentheses"),
        ("1 + input % 2", "after column 9: the operators are + - * / and parentheses"),
        ("__import__('os')", "column 1: the functions are min, max, ceil, floor"),
        ("input.__class__", "column 1: only arithmetic is possible here"),
        ("'a' * 5", "column 1: 'a' is no number"),
        ("True", "column 1: True is no number"),
        ("1 + ~input", "column 5: the operators are + - * / and parentheses"),
        ("[input]", "column 1: only arithmetic is possible here"),
        ("input if output else 1", "column 1: only arithmetic is possible here"),
        ("input; output", "column 6: this is no arithmetic expression"),
        ("max(input, key=output)", "column 1: the functions are min, max, ceil, floor"),
        ("", "column 1: this is no arithmetic expression"),
        ("1 + " * 200 + "1", "an expression has at most 500 characters, this one 801"),
        ("(" * 300, "column "),
    ],
)
def test_a_bad_expression_is_refused_by_its_column(expression: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        compile_unit("credits", expression)


names = st.sampled_from([*UNIT_NAMES, "1", "0.25", "0"])
expressions = st.recursive(
    names,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner)
        | st.builds("max({}, {})".format, inner, inner)
        | st.builds("-{}".format, inner)
    ),
    max_leaves=12,
)


@given(expressions, st.fixed_dictionaries({name: st.integers(0, 2**53).map(float) for name in UNIT_NAMES}))
def test_every_expression_that_compiles_can_be_computed_for_any_call(
    expression: str, counts: dict[str, float]
) -> None:
    if len(expression) <= 500:
        compile_unit("credits", expression).quantity(counts)
