"""What usage adds up to: customers, shares, movers, new and silent customers, what is unbilled."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from syncd.usage.figures import Amount, Figures, Payer, Slice, figures, slices

ACME, BETA, GAMMA, DELTA = (
    Payer(f"id-{name}", name, name.title()) for name in ("acme", "beta", "gamma", "delta")
)
OWNERS = {"alice": ACME, "bob": ACME, "beta": BETA, "carol": GAMMA, "dave": DELTA}


def of(now: dict[str, float], before: dict[str, float] | None = None) -> Figures:
    return figures(("requests",), [now], [before or {}], OWNERS)


def keys(found: tuple[object, ...]) -> list[str | None]:
    return [customer.customer.key for customer in found]  # type: ignore[attr-defined]


def test_a_customer_has_the_usage_of_all_its_subjects() -> None:
    found = of({"alice": 10, "bob": 5, "beta": 1}, {"alice": 3})
    assert [(c.customer.key, c.amounts) for c in found.customers] == [
        ("acme", (Amount(15, 3),)),
        ("beta", (Amount(1, 0),)),
    ]


def test_usage_without_a_customer_is_unbilled_with_its_name() -> None:
    found = figures(("requests",), [{"eve": 7, "alice": 1}], [{}], OWNERS, {"eve": "Eve"})
    assert [(s.subject, s.name, s.amounts) for s in found.unbilled] == [("eve", "Eve", (Amount(7, 0),))]
    assert (found.total(0).now, found.billed(0).now, found.unbilled_total(0).now) == (8, 1, 7)


def test_the_top_is_sorted_by_usage_and_leaves_out_who_has_none() -> None:
    found = of({"alice": 10, "beta": 30, "carol": 20}, {"dave": 5})
    assert keys(found.top(0, 2)) == ["beta", "gamma"]
    assert keys(found.top(0, 9)) == ["beta", "gamma", "acme"]
    assert found.top(0, 1)[0].share(0, found.total(0).now) == 0.5


def test_risers_and_fallers_moved_by_more_than_thirty_percent() -> None:
    before: dict[str, float] = {"alice": 100, "beta": 100, "carol": 100, "dave": 10}
    found = of({"alice": 130, "beta": 131, "carol": 69, "dave": 6}, before)
    assert keys(found.risers(0)) == ["beta"], "30 % is not more than 30 %"
    assert keys(found.fallers(0)) == ["gamma", "delta"], "the largest difference first"


def test_a_customer_without_usage_is_silent_and_no_faller() -> None:
    found = of({"beta": 1}, {"alice": 4, "carol": 9, "beta": 1})
    assert keys(found.silent()) == ["gamma", "acme"]
    assert keys(found.fallers(0)) == []


def test_a_customer_without_usage_before_has_appeared_and_is_no_riser() -> None:
    found = of({"alice": 4, "beta": 9, "carol": 1}, {"carol": 1})
    assert keys(found.appeared()) == ["beta", "acme"]
    assert keys(found.risers(0)) == []


def test_usage_of_any_meter_keeps_a_customer_from_being_silent() -> None:
    found = figures(("requests", "tokens"), [{}, {"alice": 5}], [{"alice": 8}, {}], OWNERS)
    assert found.silent() == ()
    assert found.appeared() == ()
    assert found.customers[0].amounts == (Amount(0, 8), Amount(5, 0))


def test_a_change_is_exact() -> None:
    assert Amount(130, 100).change == Decimal("0.3")
    assert Amount(5, 0).change is None


def test_slices_have_both_periods_the_largest_first() -> None:
    assert slices({"a": 1, "b": 5}, {"a": 2, "": 1}) == (
        Slice("b", Amount(5, 0)),
        Slice("a", Amount(1, 2)),
        Slice("", Amount(0, 1)),
    )


@given(
    st.dictionaries(st.sampled_from([*OWNERS, "eve", ""]), st.integers(0, 10**12)),
    st.dictionaries(st.sampled_from([*OWNERS, "eve", ""]), st.integers(0, 10**12)),
)
def test_no_event_is_lost_or_counted_twice(now: dict[str, int], before: dict[str, int]) -> None:
    found = of(dict(now), dict(before))
    assert found.total(0) == Amount(sum(now.values()), sum(before.values()))
    used = [c for c in found.customers if c.amounts[0].now]
    assert len(found.top(0, 99)) == len(used)
    assert not set(found.silent()) & set(found.appeared())
