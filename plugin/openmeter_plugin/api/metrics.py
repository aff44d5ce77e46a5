"""Prometheus metrics of the books and the delivery. The books survive restarts; the rest starts at 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from openmeter_plugin import __version__
from openmeter_plugin.api.gate import GateClient, gate_figures
from openmeter_plugin.api.health import HealthMonitor
from openmeter_plugin.books.ledger_lines import LOSS_REASONS
from openmeter_plugin.books.models import DestinationStatus, SpoolStatus
from openmeter_plugin.books.read_models import SpoolError
from openmeter_plugin.books.status import read_status
from openmeter_plugin.delivery.endpoint import HOLD_REASONS
from openmeter_plugin.metering.ai_usage import AiUsageGap
from openmeter_plugin.segments.line_format import LOST_CAUSES, Flaw
from openmeter_plugin.segments.stats import ReaderState
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.queue import writable_bytes

PREFIX: Final = "openmeter_plugin_"

Values = dict[tuple[str, ...], float]
"""Samples by their label values."""
Metric = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_COUNTERS: Final[list[tuple[str, str, Callable[[DestinationStatus], int]]]] = [
    ("requests", "Requests that Kong handed over", lambda d: d.books.requests),
    ("requests_metered", "Requests that became events", lambda d: d.books.metered),
    ("requests_resent", "Requests that Kong handed over a second time", lambda d: d.books.resent),
    ("events_accepted", "Events that were accepted for delivery", lambda d: d.books.events),
    ("events_delivered", "Events that the metering API has accepted", lambda d: d.books.delivered),
    (
        "events_redelivered",
        "Delivered events that were posted once more on request",
        lambda d: d.books.redelivered,
    ),
    (
        "ledger_events_pruned",
        "Events in pruned lines of the ledger, all of them delivered",
        lambda d: d.pruned.events if d.pruned else 0,
    ),
    ("damaged_bytes", "Bytes of the spool that could not be read", lambda d: d.books.damaged_bytes),
    (
        "books_violations",
        "How often an equation of the books stopped holding; 0 unless there is a bug",
        lambda d: d.books.violations,
    ),
    ("segments_unreadable", "Segments that could not be read at all", lambda d: d.books.unreadable_segments),
]
_GAUGES: Final[list[tuple[str, str, Callable[[DestinationStatus], float]]]] = [
    (
        "requests_quarantined",
        "Requests in quarantine",
        lambda d: d.books.quarantined,
    ),
    (
        "dead_letters",
        "Events that the metering API refused or that grew too old",
        lambda d: d.books.dead_lettered,
    ),
    ("backlog_events", "Events in the spool that are not delivered yet", lambda d: d.backlog),
    (
        "oldest_waiting_event_age_seconds",
        "Age of the oldest waiting event, by its time; 0 if none waits",
        lambda d: d.oldest_waiting.age_seconds if d.oldest_waiting else 0.0,
    ),
    ("spool_bytes", "Size of the segment files, including retained ones", lambda d: d.bytes),
]


class Metrics(Collector):
    """Collects all metrics again at each scrape."""

    def __init__(self, monitor: HealthMonitor) -> None:
        self._monitor = monitor
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterator[Any]:
        """Describe nothing: `register` would read the books."""
        return iter(())

    def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in an accepted format, and its content type. Reads the disk, so it blocks."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, without those of the books if they cannot be read."""
        yield _gauge("build_info", "Version of the plugin server", {(__version__,): 1}, ["version"])
        try:
            status = read_status(self._monitor.spool)
        except (SpoolError, OSError):
            yield _gauge("books_readable", _BOOKS_READABLE, {(): 0}, [])
        else:
            yield _gauge("books_readable", _BOOKS_READABLE, {(): 1}, [])
            yield from _books(status, reads_segments=self._monitor.reader is not None)
        yield from _disk(self._monitor.spool)
        yield from self._delivery()
        if self._monitor.gate is not None:
            for figure in gate_figures(GateClient(self._monitor.gate)):
                make = _counter if figure.is_counter else _gauge
                yield make(figure.name, figure.help_text, dict(figure.samples), figure.labels)
        if self._monitor.reader is not None:
            yield from _kong_segments(self._monitor.reader.read())
        yield _counter(
            "process_restarts",
            "How often the supervisor restarted a process",
            {(child,): count for child, count in self._monitor.restarts().items()},
            ["child"],
        )

    def _delivery(self) -> Iterator[Metric]:
        endpoints = {
            queue: delivery.endpoint
            for queue, delivery in self._monitor.queues().items()
            if queue != QUARANTINE
        }
        yield _counter(
            "delivery_retries",
            "POSTs that failed and are retried",
            {(queue,): endpoint.retries for queue, endpoint in endpoints.items()},
        )
        yield _gauge(
            "delivery_failures_in_a_row",
            "Failed POSTs since the last successful one",
            {(queue,): endpoint.failing for queue, endpoint in endpoints.items()},
        )
        yield _gauge(
            "delivery_held",
            "1 while the destination's events wait for this reason, whatever its endpoint answers",
            {
                (queue, reason): float(endpoint.held is not None and endpoint.held.reason == reason)
                for queue, endpoint in endpoints.items()
                for reason in HOLD_REASONS
            },
            ["destination", "reason"],
        )
        latency = HistogramMetricFamily(
            f"{PREFIX}delivery_post_duration_seconds",
            "Duration of successful POSTs to the metering API",
            labels=["destination"],
        )
        for queue, endpoint in endpoints.items():
            latency.add_metric([queue], endpoint.latency.buckets(), endpoint.latency.total_seconds)
        yield latency


_BOOKS_READABLE: Final = "Whether the books can be read; if 0, the metrics from the books are missing"


_SEGMENTS_GAUGES: Final[tuple[tuple[str, str, Callable[[ReaderState], float]], ...]] = (
    ("readable", "Whether the folder of the Kong segments can be read", lambda state: state.readable),
    ("pending", "Kong segments that are not read to their end", lambda state: state.segments),
    ("lag_bytes", "Bytes of Kong segments that are not read yet", lambda state: state.lag_bytes),
    (
        "lag_seconds",
        "For how long the oldest unread request in a Kong segment has waited; 0 if none waits",
        lambda state: state.lag_seconds,
    ),
    (
        "waiting",
        "Kong segments that wait for a configuration that is not in the folder",
        lambda state: state.waiting,
    ),
    (
        "unrecognised",
        "Files in the folder of the Kong segments that have such a name and no such content",
        lambda state: state.unrecognised,
    ),
    ("not_removed", "Kong segments that are read and could not be removed", lambda state: state.kept),
)


def _kong_segments(state: ReaderState) -> Iterator[Metric]:
    yield _counter("kong_segments_requests", "Requests read from Kong segments", {(): state.requests}, [])
    for name, meaning, value in _SEGMENTS_GAUGES:
        yield _gauge(f"kong_segments_{name}", meaning, {(): value(state)}, [])


def _books(status: SpoolStatus, *, reads_segments: bool) -> Iterator[Metric]:
    destinations = status.destinations
    for name, help_text, value in _COUNTERS:
        yield _counter(name, help_text, {(d.id,): value(d) for d in destinations})
    for name, help_text, number in _GAUGES:
        yield _gauge(name, help_text, {(d.id,): number(d) for d in destinations})
    skipped: Values = {
        (d.id, reason): count for d in destinations for reason, count in d.books.skipped.items()
    }
    yield _counter("requests_skipped", "Requests without an event", skipped, ["destination", "reason"])
    lost: Values = {(d.id, "disk"): 0 for d in destinations}  # present before the first loss, for alerts
    if reads_segments:
        lost |= {(QUARANTINE, cause): 0 for cause in (*LOST_CAUSES, Flaw.DAMAGED, Flaw.TORN)}
    lost |= {(d.id, reason): count for d in destinations for reason, count in d.books.lost.items()}
    yield _counter(
        "requests_lost",
        "Requests that could not be written to the spool or to a Kong segment",
        lost,
        ["destination", "reason"],
    )
    # Present before the first loss, for alerts.
    lost_events: Values = {(d.id, cause): 0 for d in destinations for cause in LOSS_REASONS}
    lost_events |= {
        (d.id, cause): count for d in destinations for cause, count in d.books.lost_events.items()
    }
    yield _counter(
        "events_lost",
        "Accepted events whose bytes were damaged or gone before they were delivered",
        lost_events,
        ["destination", "reason"],
    )
    # Present before the first gap, for alerts.
    gaps: Values = {(d.id, gap): 0 for d in destinations for gap in AiUsageGap}
    gaps |= {(d.id, gap): count for d in destinations for gap, count in d.books.ai_usage_gaps.items()}
    yield _counter(
        "ai_usage_gaps",
        "Requests whose AI usage Kong estimated or did not log",
        gaps,
        ["destination", "reason"],
    )
    known: Values = {(d.id, d.endpoint): 1.0 for d in destinations if d.endpoint is not None}
    yield _gauge("destination_info", "Endpoint of a destination", known, ["destination", "endpoint"])


def _disk(spool: Path) -> Iterator[Metric]:
    try:
        disk, free = os.statvfs(spool), max(0, writable_bytes(spool))
    except OSError:
        return
    size = disk.f_blocks * disk.f_frsize
    yield _gauge("disk_free_bytes", "Bytes that the spool can still use of its disk", {(): free}, [])
    yield _gauge("disk_size_bytes", "Size of the spool's disk", {(): size}, [])


def _counter(
    name: str, help_text: str, values: Values, labels: list[str] | None = None
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=_labels(labels))
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _gauge(name: str, help_text: str, values: Values, labels: list[str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=_labels(labels))
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _labels(labels: list[str] | None) -> list[str]:
    return ["destination"] if labels is None else labels
