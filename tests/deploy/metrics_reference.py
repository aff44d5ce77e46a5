"""The tables of docs/observability.md, made of what the running processes say and of the alerts.

`python -m tests.deploy.metrics_reference` writes them into the page; a test holds that they are up to date.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.deploy.files import ROOT
from tests.deploy.monitoring import rules, runbook_of
from tests.deploy.scraped import Family, scrape

PAGE: Final = ROOT / "docs" / "observability.md"

_METRICS: Final = re.compile(r"(<!-- metrics: (\S+) -->\n)(.*?)(<!-- end of metrics -->\n)", re.DOTALL)
_ALERTS: Final = re.compile(r"(<!-- alerts -->\n)(.*?)(<!-- end of alerts -->\n)", re.DOTALL)


def written(page: str, families: Mapping[str, Family]) -> str:
    """Return the page with its tables made anew."""

    def metrics(match: re.Match[str]) -> str:
        return match[1] + _metrics_table(families, match[2]) + match[4]

    return _ALERTS.sub(lambda match: match[1] + _alerts_table() + match[3], _METRICS.sub(metrics, page))


def _metrics_table(families: Mapping[str, Family], prefix: str) -> str:
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in sorted(families.values(), key=lambda family: family.name):
        if family.name.startswith(prefix):
            labels = ", ".join(sorted(family.labels))
            lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.meaning} |")
    return "\n".join(lines) + "\n"


def _alerts_table() -> str:
    lines = ["| alert | severity | when | for |", "|---|---|---|---|"]
    for rule in rules():
        _, anchor = runbook_of(rule)
        when = " ".join(rule["expr"].split()).replace("|", "\\|")
        lines.append(
            f"| [{rule['alert']}](runbook.md#{anchor}) | {rule['labels']['severity']} | `{when}` "
            f"| {rule.get('for', '')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the tables."""
    with tempfile.TemporaryDirectory() as folder:
        families: dict[str, Any] = scrape(Path(folder))
    PAGE.write_text(written(PAGE.read_text(), families))


if __name__ == "__main__":
    main()
