"""A month's usage as the meters have it: the same figures whatever the order of a server's rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from syncd.close.meters import Others, month_usage
from syncd.config import settings
from syncd.core.model import ObservedCustomer
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER

VALUES = {"alice": 0.1, "bob": 0.2, "carol": 0.3}


def figures_of(folder: Path, values: Mapping[str, float]) -> dict[str, Any]:
    (folder / "syncd.yaml").write_text(
        "metering: {url: 'http://127.0.0.1:9'}\nsources: [{type: static, subjects: [{key: a}]}]\n"
    )
    acme = ObservedCustomer("C1", "acme", "Acme", tuple(values), {})
    read = {REQUESTS_METER: dict.fromkeys(values, 1), TOKENS_METER: values, "seconds": values}
    found = month_usage(settings.load(folder / "syncd.yaml"), [acme], read, Others(("seconds",)), None, {})
    return found.figures({})


def test_sums_of_fractions_are_the_same_in_any_order_of_rows_and_subjects(tmp_path: Path) -> None:
    totals = set()
    for order in permutations(VALUES):
        found = figures_of(tmp_path, {subject: VALUES[subject] for subject in order})
        (customer,) = found["customers"]
        totals.add(found["meters"]["seconds"]["total"])
        totals.add(found["totals"]["tokens"])
        totals |= {customer["tokens"], customer["meters"]["seconds"]}
    assert totals == {0.6}
