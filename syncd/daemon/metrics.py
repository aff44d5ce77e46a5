"""The daemon's Prometheus metrics; docs/runbook.md explains the alerts on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from syncd import __version__
from syncd.close.closing import CHECKED_MONTHS
from syncd.close.store import ClosedMonth
from syncd.core.changes import ChangeKind, Outcome
from syncd.core.unbilled import Fate, UnbilledUsage
from syncd.http.client import request_counts
from syncd.runs.run import Run, RunObserver, RunState

_OF_ALL = ("syncd_info", "syncd_leader", "syncd_config_current", "syncd_api_calls_total")
"""Metrics that a daemon has too that does no runs."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


# When each counter began: as many series again, which nothing reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(RunObserver):
    """An observer of runs (`syncd.runs.queue.RunObserver`) that updates the metrics of one daemon."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_ApiCalls())
        info = Gauge("syncd_info", "Always 1; the version is a label.", ["version"], registry=registry)
        info.labels(__version__).set(1)
        self._attempt = _gauge(registry, "last_attempt_timestamp_seconds", "Start of the last real run.")
        self._success = _gauge(
            registry, "last_success_timestamp_seconds", "End of the last real run that did not fail."
        )
        self._in_sync = _gauge(
            registry, "in_sync", "1 if the last plan was empty and nothing was blocked, else 0."
        )
        self._blocked = _gauge(
            registry,
            "blocked",
            "Blocked changes in the last plan, without those that a subscription or a customer made by hand"
            " blocks.",
        )
        self._subjects = Gauge(
            "syncd_unbilled_subjects",
            "Subjects with usage but no customer: planned (the plan attributes them), blocked, settled"
            " (blocked by decision), unknown, or ignored (meant to be so).",
            ["status"],
            registry=registry,
        )
        self._events = Gauge(
            "syncd_unbilled_events",
            "Events of subjects without a customer in the last 31 days, by status of the subject.",
            ["status"],
            registry=registry,
        )
        self._known = _gauge(
            registry, "unbilled_known", "1 if unbilled usage could be read from the meters, else 0."
        )
        self._runs = Counter(
            "syncd_runs",
            "Runs by trigger, dry run or not, and result.",
            ["trigger", "dry_run", "result"],
            registry=registry,
        )
        self._failures = Counter(
            "syncd_run_failures", "Failed runs by reason.", ["reason"], registry=registry
        )
        self._changes = Counter(
            "syncd_changes", "Changes tried, by kind and outcome.", ["kind", "outcome"], registry=registry
        )
        self._planned = Gauge(
            "syncd_planned_changes", "Changes in the last plan, by kind.", ["kind"], registry=registry
        )
        self._leader = _gauge(registry, "leader", "1 if this syncd does the runs, else 0.")
        self._late = {
            what: Gauge(
                f"syncd_late_{what}",
                f"By how many {what} the meters of a closed month differ from its report.",
                ["month"],
                registry=registry,
            )
            for what in ("requests", "tokens")
        }
        self._late_check = _gauge(
            registry,
            "late_check_timestamp_seconds",
            "When closed months were last compared with the meters.",
        )
        self.config_current = _gauge(
            registry,
            "config_current",
            "0 if the last reload was refused and the previous configuration is still in use, else 1.",
        )
        self.config_current.set(1)

    def exposition(self, *, leads: bool = True) -> bytes:
        """Return the metrics in Prometheus' text format; those of runs only if this daemon does them."""
        self._leader.set(leads)
        if leads:
            return generate_latest(self.registry)
        return generate_latest(self.registry.restricted_registry(_OF_ALL))

    def closed_months(self, months: Sequence[ClosedMonth]) -> None:
        """Set what has arrived for closed months since they were closed."""
        for one in months[:CHECKED_MONTHS]:
            self._late["requests"].labels(str(one.month)).set(one.late_requests)
            self._late["tokens"].labels(str(one.month)).set(one.late_tokens)
        self._late_check.set_to_current_time()

    def started(self, run: Run) -> None:
        """Record the attempt."""
        if not run.dry_run:
            self._attempt.set_to_current_time()

    def planned(self, run: Run) -> None:
        """Record the plan, unless the run is restricted to some principals."""
        plan = run.plan
        if plan is None or not run.options.scope.whole:
            return
        for kind, number in plan.summary().items():
            self._planned.labels(kind).set(number)
        self._blocked.set(sum(not change.settled for change in plan.of(ChangeKind.BLOCKED)))
        self._in_sync.set(plan.in_sync)
        self._known.set(plan.unbilled is not None)
        self._set_unbilled(run.unbilled)

    def _set_unbilled(self, unbilled: UnbilledUsage | None) -> None:
        for status in get_args(Fate):
            self._subjects.labels(status).set(unbilled.count(status) if unbilled else 0)
            self._events.labels(status).set(unbilled.events(status) if unbilled else 0)
        self._subjects.labels("ignored").set(len(unbilled.ignored) if unbilled else 0)
        self._events.labels("ignored").set(unbilled.ignored_events if unbilled else 0)

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:  # noqa: ARG002 - the Observer protocol
        """Count the changes; those blocked by the plan itself are in `syncd_blocked`."""
        for outcome in filter(lambda outcome: outcome.change.actionable, outcomes):
            self._changes.labels(str(outcome.change.kind), str(outcome.status)).inc()

    def finished(self, run: Run) -> None:
        """Count the run; what it attributed is no longer unbilled."""
        if run.outcomes and run.options.scope.whole:
            self._set_unbilled(run.unbilled)
        dry_run = "true" if run.dry_run else "false"
        self._runs.labels(run.trigger, dry_run, str(run.state)).inc()
        if run.failure:
            self._failures.labels(run.failure).inc()
        if run.state is not RunState.FAILED and not run.dry_run:
            self._success.set_to_current_time()


def _gauge(registry: CollectorRegistry, name: str, text: str) -> Gauge:
    return Gauge(f"syncd_{name}", text, registry=registry)


class _ApiCalls(Collector):
    """Requests sent by this process, as counted by `syncd.http.client`."""

    def collect(self) -> Iterator[Metric]:
        """Yield the counter."""
        family = CounterMetricFamily(
            "syncd_api_calls",
            "Requests sent, by API, method and status.",
            labels=["api", "method", "status"],
        )
        for labels, number in request_counts().items():
            family.add_metric(list(labels), number)
        yield family
