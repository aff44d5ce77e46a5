"""The alerts and the dashboard of docs/examples, and what the PromQL in them asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import promql_parser
import yaml

from tests.deploy.files import ROOT

PROMETHEUS: Final = ROOT / "docs" / "examples" / "prometheus"
DASHBOARD: Final = ROOT / "docs" / "examples" / "grafana" / "kong-openmeter.json"
RUNBOOK: Final = ROOT / "docs" / "runbook.md"


@dataclass(frozen=True)
class Asked:
    """A metric that an expression asks for, and the labels that it picks by."""

    metric: str
    labels: frozenset[str]


@dataclass
class Query:
    """What is in an expression; `grouped` are the labels that it groups or joins by."""

    asked: list[Asked] = field(default_factory=list)
    grouped: set[str] = field(default_factory=set)


def query(expression: str) -> Query:
    """Return what an expression asks for; raises ValueError where it is no PromQL."""
    found = Query()

    def visit(node: promql_parser.Expr) -> bool:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql_parser.VectorSelector):
            assert selector.name is not None
            labels = frozenset(matcher.name for matcher in selector.matchers.matchers)
            found.asked.append(Asked(selector.name, labels))
        modifier = getattr(node, "modifier", None)
        for labelled in (modifier, getattr(modifier, "matching", None)):
            found.grouped |= set(getattr(labelled, "labels", None) or ())
        found.grouped |= set(getattr(modifier, "group_labels", None) or ())
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def rules() -> list[dict[str, Any]]:
    """Return the alerts."""
    return [rule for rule in _all_rules() if "alert" in rule]


def recorded() -> list[dict[str, Any]]:
    """Return the rules that make series, in their order."""
    return [rule for rule in _all_rules() if "record" in rule]


def runbook_of(rule: dict[str, Any]) -> tuple[str, str]:
    """Return where an alert leads to: what says the address of the page, and the anchor in it."""
    address, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    return address, anchor


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    """Yield the title and each expression of the dashboard, its variables filled in."""
    found = dashboard()
    for panel in found["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], _filled(target["expr"])
    for annotation in found["annotations"]["list"]:
        yield annotation["name"], _filled(annotation["expr"])
    for variable in found["templating"]["list"]:
        if variable["type"] == "query":
            (asked,) = re.findall(r"^label_values\((.+), \w+\)$", variable["query"]["query"])
            yield variable["name"], _filled(asked)


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _all_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _filled(expression: str) -> str:
    return (
        expression.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$destination", ".*")
    )
