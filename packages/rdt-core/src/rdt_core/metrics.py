"""Prometheus metrics of weight syncs: an observer of drivers, and what coordinators say at a scrape.

For a gateway, a plain driver or a command alike::

    from prometheus_client import start_http_server
    sync = WeightSync.connect("policy", engines, observers=[SyncMetrics()])
    start_http_server(9100)

Needs ``rdt-core[metrics]``. docs/operations.md says what to look at when.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError, RdtError
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
    import prometheus_client
    from prometheus_client.core import GaugeMetricFamily
except ImportError as error:
    raise ConfigError(
        f"metrics need prometheus_client, which this Python does not have ({error}). Install it with "
        "`pip install 'rdt-core[metrics]'`."
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rdt_core.report import SyncFailure, SyncReport


class SyncMetrics:
    """A :class:`rdt_core.observer.SyncObserver` that counts. One for all groups of a process.

    Args:
        registry: where the metrics appear; prometheus_client's own by default.
    """

    def __init__(self, registry: Any = None) -> None:
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        self._lock = threading.Lock()
        self._status_of: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._served = ServedVersions()
        self._metrics = {measure.name: _make(measure, self._registry) for measure in MEASURES}
        self._registry.register(self)

    def watch(self, group: str, status_of: Callable[[], Mapping[str, Any]]) -> None:
        """Ask a group's coordinator at every scrape, until the group is closed.

        Args:
            group: to watch.
            status_of: ``WeightSync.status`` or ``CoordinatorClient.status``; blocks for the answer.
        """
        with self._lock:
            self._status_of[group] = status_of

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Every engine is shown from now on, with the version it said that it holds."""
        with self._lock:
            self._served.connect(group, engines)

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Count a completed sync."""
        with self._lock:
            self._served.sync(group, report)
        self._add(measure_sync(group, report))

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Count a failed sync."""
        self._add(measure_failure(group, failure))

    def on_closed(self, group: str) -> None:
        """The group's engines and its coordinator are no longer shown; what was counted stays."""
        with self._lock:
            self._served.close(group)
            self._status_of.pop(group, None)

    def close(self) -> None:
        """Leave the registry. Idempotent."""
        try:
            self._registry.unregister(self)
        except KeyError:
            return

    def describe(self) -> Iterable[Any]:
        """Nothing: prometheus_client then collects at no time but a scrape."""
        return []

    def collect(self) -> Iterable[Any]:
        """What is known at a scrape only. Called by prometheus_client; blocks for the coordinators."""
        with self._lock:
            served = self._served.all()
            status_of = dict(self._status_of)
        families = _Families()
        for group, engines in sorted(served.items()):
            for engine, version in sorted(engines.items()):
                families.engine_version.add_metric([group, engine], version)
        for group, ask in sorted(status_of.items()):
            try:
                status = ask()
            except RdtError:
                families.up.add_metric([group], 0)
                continue
            families.up.add_metric([group], 1)
            families.add_status(group, status, served.get(group, {}))
        return families.all()

    def _add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            metric = self._metrics[sample.name].labels(*sample.labels)
            if isinstance(metric, prometheus_client.Counter):
                metric.inc(sample.value)
            elif isinstance(metric, prometheus_client.Histogram):
                metric.observe(sample.value)
            else:
                metric.set(sample.value)


def _make(
    measure: Measure, registry: Any
) -> prometheus_client.Counter | prometheus_client.Gauge | prometheus_client.Histogram:
    if measure.kind == "histogram":
        return prometheus_client.Histogram(
            measure.name, measure.description, measure.labels, buckets=BUCKETS_S, registry=registry
        )
    kind = prometheus_client.Counter if measure.kind == "counter" else prometheus_client.Gauge
    return kind(measure.name, measure.description, measure.labels, registry=registry)


class _Families:
    """The gauges of one scrape."""

    def __init__(self) -> None:
        self.up = GaugeMetricFamily(
            "rdt_coordinator_up", "Whether the group's coordinator answered.", labels=["group"]
        )
        self.engine_version = GaugeMetricFamily(
            "rdt_engine_version", "Version that an engine serves.", labels=["group", "engine"]
        )
        self.trainer_version = GaugeMetricFamily(
            "rdt_trainer_version", "Version that every trainer rank has published.", labels=["group"]
        )
        self.staleness = GaugeMetricFamily(
            "rdt_staleness_versions",
            "The trainers' version less the engine's.",
            labels=["group", "engine"],
        )
        self.trainers = GaugeMetricFamily(
            "rdt_trainer_ranks", "Trainer ranks of the group, alive or silent.", labels=["group", "state"]
        )
        self.engine_ranks = GaugeMetricFamily(
            "rdt_engine_ranks", "Engine ranks that have joined the group.", labels=["group"]
        )
        self.leases = GaugeMetricFamily(
            "rdt_leases", "Reads for which trainers must not write now.", labels=["group"]
        )

    def add_status(self, group: str, status: Mapping[str, Any], served: Mapping[str, int]) -> None:
        trainers = list(status.get("trainers", {}).values())
        published = min((int(trainer["version"]) for trainer in trainers), default=0)
        alive = sum(bool(trainer["alive"]) for trainer in trainers)
        self.trainer_version.add_metric([group], published)
        self.trainers.add_metric([group, "alive"], alive)
        self.trainers.add_metric([group, "silent"], len(trainers) - alive)
        self.engine_ranks.add_metric([group], len(status.get("engines", ())))
        self.leases.add_metric([group], len(status.get("leases", ())))
        for engine, version in sorted(served.items()):
            self.staleness.add_metric([group, engine], max(0, published - version))

    def all(self) -> list[Any]:
        return list(vars(self).values())
