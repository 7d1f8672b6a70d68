"""The figures of one process to Ray, which shows them to Prometheus.

Nothing here is called per token: processes count in plain numbers and hand them over once a second.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable

from ray.util import metrics as ray_metrics

from deepseek_ray.metrics import METRICS

logger = logging.getLogger(__name__)

EXPORT_SECONDS = 1.0


class MetricsExporter:
    """Hands over metrics of `deepseek_ray/metrics.py`; `labels` are those that all of them share here."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._totals: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def add(self, name: str, amount: float, **labels: str) -> None:
        """A counter rises by `amount`."""
        if amount > 0:
            _counter(name).inc(amount, {**self._labels, **labels})

    def total(self, name: str, value: float, **labels: str) -> None:
        """A counter stands at `value`, counted since this exporter was made."""
        key = (name, frozenset(labels.items()))
        self.add(name, value - self._totals.get(key, 0.0), **labels)
        self._totals[key] = value

    def set(self, name: str, value: float, **labels: str) -> None:
        _gauge(name).set(value, {**self._labels, **labels})

    def observe(self, name: str, values: Iterable[float], **labels: str) -> None:
        histogram, tags = _histogram(name), {**self._labels, **labels}
        for value in values:
            histogram.observe(value, tags)


def export_every_second(collect: Callable[[], None]) -> None:
    """Call `collect` once a second in a thread of its own, as long as the process lives."""
    threading.Thread(target=_export_loop, args=(collect,), name="metrics", daemon=True).start()


def _export_loop(collect: Callable[[], None]) -> None:
    never = threading.Event()
    while not never.wait(EXPORT_SECONDS):
        try:
            collect()
        except Exception:  # a figure that cannot be had must not end the others
            logger.exception("metrics were not exported")


@functools.cache
def _counter(name: str) -> ray_metrics.Counter:
    metric = METRICS[name]
    assert metric.kind == "counter", f"{name} is a {metric.kind}"
    return ray_metrics.Counter(name, metric.help, metric.labels)


@functools.cache
def _gauge(name: str) -> ray_metrics.Gauge:
    metric = METRICS[name]
    assert metric.kind == "gauge", f"{name} is a {metric.kind}"
    return ray_metrics.Gauge(name, metric.help, metric.labels)


@functools.cache
def _histogram(name: str) -> ray_metrics.Histogram:
    metric = METRICS[name]
    assert metric.kind == "histogram", f"{name} is a {metric.kind}"
    return ray_metrics.Histogram(name, metric.help, list(metric.buckets), metric.labels)
