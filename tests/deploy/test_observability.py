"""Alerts, dashboard, runbook and pages speak of metrics that the running processes have, and of no others."""

from __future__ import annotations

import re
import subprocess
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.deploy.files import ROOT
from tests.deploy.helm import CHART, render
from tests.deploy.metrics_reference import PAGE, written
from tests.deploy.monitoring import (
    PROMETHEUS,
    RUNBOOK,
    Query,
    anchors,
    dashboard,
    dashboard_expressions,
    query,
    recorded,
    rules,
    runbook_of,
)
from tests.deploy.scraped import Family, scrape
from tests.deploy.tools import needs, tool

pytestmark = pytest.mark.slow

OF_THE_SCRAPE = {"instance", "job"}
"""Labels that Prometheus adds; `up` is its own metric."""

EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in rules()] + list(dashboard_expressions())
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

each_rule = pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return scrape(tmp_path_factory.mktemp("scraped"))


def with_series(families: dict[str, Family]) -> dict[str, set[str]]:
    """The names that can be asked for, with their labels; a histogram is three series."""
    # The rules of the alerts record the second.
    found = {"up": set(OF_THE_SCRAPE), "kong_openmeter_runbook": {"url"}}
    for name, family in families.items():
        labels = set(family.labels) | OF_THE_SCRAPE
        names = (
            [f"{name}_{part}" for part in ("bucket", "sum", "count")]
            if family.kind == "histogram"
            else [name]
        )
        found |= {series: labels | ({"le"} if series.endswith("_bucket") else set()) for series in names}
    return found


# Names


def test_every_metric_of_an_alert_or_a_panel_exists_and_has_the_labels_that_are_picked_by(
    families: dict[str, Family],
) -> None:
    there = with_series(families)
    assert len(EXPRESSIONS) > 50
    for title, expression in EXPRESSIONS:
        for asked in query(expression).asked:
            assert asked.metric in there, f"{title}: {asked.metric}"
            assert asked.labels <= there[asked.metric], f"{title}: {asked.labels - there[asked.metric]}"


def test_every_label_that_is_grouped_or_joined_by_is_on_a_metric_of_the_expression(
    families: dict[str, Family],
) -> None:
    there = with_series(families)
    for title, expression in EXPRESSIONS:
        found: Query = query(expression)
        labels = set().union(*(there[asked.metric] for asked in found.asked))
        assert found.grouped <= labels, f"{title}: {found.grouped - labels}"


def test_a_metric_that_does_not_exist_would_have_been_found() -> None:
    found = query("sum by (instance) (rate(no_such_total{reason='x'}[5m])) / on (le) group_left (a) other")
    assert {(asked.metric, asked.labels) for asked in found.asked} == {
        ("no_such_total", frozenset({"reason"})),
        ("other", frozenset()),
    }
    assert found.grouped == {"instance", "le", "a"}


def test_every_metric_that_a_page_speaks_of_exists(families: dict[str, Family]) -> None:
    there = set(with_series(families)) | set(families)
    for page in PAGES:
        named = set(re.findall(r"\b(?:openmeter_plugin|syncd)_[a-z0-9_]+(?!\w|\.py|\*)", page.read_text()))
        # A pattern such as openmeter_plugin_* names none, and neither does the name of a package.
        named = {name for name in named if not name.endswith("_")}
        assert named - there == set(), page.name


def test_every_metric_is_in_the_dashboard_or_says_why_not(families: dict[str, Family]) -> None:
    shown = {asked.metric for _, expression in dashboard_expressions() for asked in query(expression).asked}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    # Alerts on it; figures that grow while nothing happens, or by what was pruned, say nothing in a picture.
    not_shown = {
        "openmeter_plugin_requests_total",
        "openmeter_plugin_books_violations_total",
        "openmeter_plugin_ledger_events_pruned_total",
        "openmeter_plugin_kong_segments_requests_total",
        "openmeter_plugin_kong_segments_readable",
        "openmeter_plugin_kong_segments_lag_bytes",
        "syncd_last_attempt_timestamp_seconds",
        "syncd_late_requests",
        "syncd_late_tokens",
        "syncd_late_check_timestamp_seconds",
        "syncd_leader",
        "openmeter_plugin_gate_kongs",
        "openmeter_plugin_gate_up",
    }
    assert set(families) - shown == not_shown


def test_the_tables_of_the_page_are_those_of_the_running_processes(families: dict[str, Family]) -> None:
    page = PAGE.read_text()
    assert written(page, families) == page, "write them anew: python -m tests.deploy.metrics_reference"
    assert all(f"| `{name}` |" in page for name in families)


# Alerts


@each_rule
def test_an_alert_tells_what_it_means_and_leads_to_what_to_do(rule: dict[str, Any]) -> None:
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    address, anchor = runbook_of(rule)
    assert address == '{{ with query "kong_openmeter_runbook" }}{{ . | first | label "url" }}{{ end }}'
    assert anchor in anchors(RUNBOOK.read_text()), anchor


def test_where_the_runbook_is_read_is_set_in_one_place_and_leads_to_the_page_until_then() -> None:
    (rule,) = recorded()
    assert rule == {
        "record": "kong_openmeter_runbook",
        "expr": "vector(1)",
        "labels": {"url": "docs/runbook.md"},
    }
    assert ROOT / rule["labels"]["url"] == RUNBOOK
    alerts = (PROMETHEUS / "alerts.yaml").read_text()
    assert alerts.count("docs/runbook.md}") == 1
    assert not re.search(r"https?://(?!git\.example\.com)", alerts)


@needs("helm")
def test_a_value_of_the_chart_sets_the_address_of_the_runbook() -> None:
    address = "https://git.example.com/kong-openmeter/blob/main/docs/runbook.md"
    rules_of_the_operator = alerts_of_the_chart()["groups"][0]["rules"][0]
    assert rules_of_the_operator["labels"] == {"url": address}


def alerts_of_the_chart() -> dict[str, Any]:
    """The PrometheusRule's rules."""
    (rule,) = (m for m in render("kong-admin", "monitoring") if m["kind"] == "PrometheusRule")
    found: dict[str, Any] = rule["spec"]
    return found


@each_rule
def test_what_an_alert_names_by_label_is_on_its_result(
    rule: dict[str, Any], families: dict[str, Family]
) -> None:
    there = with_series(families)
    said = " ".join(rule["annotations"].values())
    found = query(rule["expr"])
    labels = found.grouped or set().union(*(there[asked.metric] for asked in found.asked))
    assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels


def test_the_runbook_begins_with_a_list_of_what_alerts_lead_to() -> None:
    reached = {runbook_of(rule)[1] for rule in rules()}
    index = RUNBOOK.read_text().partition("\n## ")[0]
    listed = set(re.findall(r"^\| \[[^]]+\]\(#([\w-]+)\)", index, re.MULTILINE))
    assert listed == reached
    assert set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK.read_text())) <= anchors(RUNBOOK.read_text())


@needs("helm")
def test_the_jobs_have_the_names_that_the_alerts_know_them_by() -> None:
    scraped = yaml.safe_load((PROMETHEUS / "scrape.yaml").read_text())["scrape_configs"]
    jobs = {job["job_name"] for job in scraped}
    monitors = [
        endpoint
        for manifest in render("gateways", "monitoring")
        if manifest["kind"] in {"PodMonitor", "ServiceMonitor"}
        for endpoint in [
            *manifest["spec"].get("podMetricsEndpoints", ()),
            *manifest["spec"].get("endpoints", ()),
        ]
    ]
    assert {r["replacement"] for e in monitors for r in e["relabelings"] if r["targetLabel"] == "job"} == jobs
    known = {found for rule in rules() for found in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert known == jobs


def test_the_chart_brings_the_same_alerts() -> None:
    # helm reads no file outside of the chart. After a change: cp docs/examples/prometheus/alerts.yaml
    # docs/examples/helm/kong-openmeter/files/
    assert (CHART / "files" / "alerts.yaml").read_text() == (PROMETHEUS / "alerts.yaml").read_text()


@needs("helm")
def test_the_prometheus_operator_gets_the_same_alerts() -> None:
    here, there = alerts_of_the_chart(), yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())
    for groups in (here["groups"], there["groups"]):
        groups[0]["rules"][0].pop("labels")  # the runbook's address
    assert here == there


def test_every_alert_is_tried_in_the_unit_tests_of_the_rules() -> None:
    tried = (PROMETHEUS / "alerts_test.yaml").read_text()
    assert [rule["alert"] for rule in rules() if f'"{rule["alert"]}"' not in tried] == []


@needs("promtool")
def test_prometheus_takes_the_rules_and_they_fire_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            [str(tool("promtool")), *command], cwd=PROMETHEUS, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# The dashboard


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard()["panels"]
    return found


def test_no_panel_lies_on_another_and_none_reaches_over_the_edge() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        return {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}

    for one, other in combinations(panels(), 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_panels_have_ids_of_their_own_and_ask_the_prometheus_that_was_chosen() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            named = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert named <= variables


def test_a_legend_names_only_labels_of_its_expression(families: dict[str, Family]) -> None:
    there = with_series(families)
    for panel in panels():
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            expression = target["expr"].replace("$__rate_interval", "5m")
            found = query(expression)
            labels = found.grouped | set().union(*(there[asked.metric] for asked in found.asked))
            assert named <= labels, panel["title"]


def test_each_figure_that_somebody_must_act_on_leads_to_a_section_of_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    sections = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.+)$", runbook, re.MULTILINE)
    }
    assert any(variable["name"] == "runbook" for variable in dashboard()["templating"]["list"])
    for panel in panels():
        steps = panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", ())
        links = [link["url"].partition("#") for link in panel.get("links", ())]
        assert all(url == "${runbook}" and section in sections for url, _, section in links), panel["title"]
        if panel["type"] == "stat" and any(step["color"] in {"red", "orange"} for step in steps):
            assert links, panel["title"]


def test_the_dashboard_begins_with_the_business() -> None:
    assert panels()[0]["title"] == "Business: is all usage billed?"
    first = [panel["title"] for panel in panels() if 0 < panel["gridPos"]["y"] < 13]
    assert "Events delivered, 24 h" in first
    assert "Unbilled events" in first
