"""Metrics of weight syncs as Ray's own, for clusters that are watched through Ray's dashboard.

    sync = WeightSync.connect("policy", engines, observers=[RaySyncMetrics()])

Ray's agent on the driver's node exports them with all of Ray's, under the names of :mod:`rdt_core.measures`
with ``ray_`` before them. Needs ``ray[default]`` there; without its agent, Ray drops them silently.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError
from rdt_core.measures import (
    BUCKETS_S,
    MEASURES,
    Measure,
    Sample,
    ServedVersions,
    measure_failure,
    measure_sync,
)

try:
    from ray.util import metrics
except ImportError as error:
    raise ConfigError(
        f"Ray's metrics need Ray, which this Python does not have ({error}). Install it with "
        "`pip install 'rdt-core[ray]'`."
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rdt_core.report import SyncFailure, SyncReport

_VERSIONS = (
    Measure("rdt_engine_version", "gauge", "Version that an engine serves.", ("group", "engine")),
    Measure("rdt_trainer_version", "gauge", "Version that the last sync found published.", ("group",)),
    Measure(
        "rdt_staleness_versions",
        "gauge",
        "That version less the engine's.",
        ("group", "engine"),
    ),
)


class RaySyncMetrics:
    """A :class:`rdt_core.observer.SyncObserver` that counts. One for all groups of a process.

    Made in a process that has joined Ray. What only coordinators know (leases, silent ranks, what trainers
    have published since) is in :class:`rdt_core.metrics.SyncMetrics`, which asks them when it is scraped; Ray
    does not ask. Ray keeps showing the last version of an engine that is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served = ServedVersions()
        self._labels = {measure.name: measure.labels for measure in (*MEASURES, *_VERSIONS)}
        self._metrics = {measure.name: _make(measure) for measure in (*MEASURES, *_VERSIONS)}

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Every engine is shown from now on, with the version it said that it holds."""
        with self._lock:
            self._served.connect(group, engines)
            served = self._served.of(group)
        self._add(Sample("rdt_engine_version", (group, engine), held) for engine, held in served.items())

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Count a completed sync."""
        self._add(measure_sync(group, report))
        with self._lock:
            self._served.sync(group, report)
        self._add_versions(group, report.version)

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Count a failed sync."""
        self._add(measure_failure(group, failure))
        if failure.phase != "publish_wait":  # in which nobody has said yet that the version is there
            self._add_versions(group, failure.version)

    def on_closed(self, group: str) -> None:
        """Nothing more will be told of the group's engines; what was counted stays."""
        with self._lock:
            self._served.close(group)

    def _add_versions(self, group: str, published: int) -> None:
        with self._lock:
            served = self._served.of(group)
        self._add([Sample("rdt_trainer_version", (group,), published)])
        for engine, version in served.items():
            self._add(
                [
                    Sample("rdt_engine_version", (group, engine), version),
                    Sample("rdt_staleness_versions", (group, engine), max(0, published - version)),
                ]
            )

    def _add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            tags = dict(zip(self._labels[sample.name], sample.labels, strict=True))
            metric = self._metrics[sample.name]
            if isinstance(metric, metrics.Counter):
                if sample.value > 0:  # Ray refuses to count nothing
                    metric.inc(sample.value, tags)
            elif isinstance(metric, metrics.Histogram):
                metric.observe(sample.value, tags)
            else:
                metric.set(sample.value, tags)


def _make(measure: Measure) -> metrics.Counter | metrics.Gauge | metrics.Histogram:
    if measure.kind == "histogram":
        return metrics.Histogram(measure.name, measure.description, list(BUCKETS_S), measure.labels)
    kind = metrics.Counter if measure.kind == "counter" else metrics.Gauge
    return kind(measure.name, measure.description, measure.labels)
