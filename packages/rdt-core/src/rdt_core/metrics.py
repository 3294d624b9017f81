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

    from rdt_core.report import LinkReport, SyncFailure, SyncReport

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_PHASES = ("publish_wait", "prepare", "commit", "stall", "total")


class SyncMetrics:
    """A :class:`rdt_core.observer.SyncObserver` that counts. One for all groups of a process.

    Args:
        registry: where the metrics appear; prometheus_client's own by default.
    """

    def __init__(self, registry: Any = None) -> None:
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        self._lock = threading.Lock()
        self._status_of: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._served: dict[str, dict[str, int]] = {}
        options = {"registry": self._registry}
        self._phase = prometheus_client.Histogram(
            "rdt_sync_phase_seconds",
            "Seconds of each phase of a completed sync; stall is how long generation stood.",
            ["group", "phase"],
            buckets=_BUCKETS_S,
            **options,
        )
        self._syncs = prometheus_client.Counter("rdt_syncs", "Completed syncs.", ["group"], **options)
        self._failures = prometheus_client.Counter(
            "rdt_sync_failures",
            "Syncs that ended without a commit, by the phase and the error that ended them.",
            ["group", "phase", "error_type"],
            **options,
        )
        self._bytes = prometheus_client.Counter(
            "rdt_synced_bytes", "Payload that landed in engines.", ["group"], **options
        )
        self._link_bytes = prometheus_client.Counter(
            "rdt_link_bytes", "Bytes that crossed links, by kind.", ["group", "transport"], **options
        )
        self._link_seconds = prometheus_client.Counter(
            "rdt_link_seconds",
            "Seconds that links of a kind were read, added up over links.",
            ["group", "transport"],
            **options,
        )
        self._link_rate = prometheus_client.Gauge(
            "rdt_link_gigabytes_per_second",
            "Rate of one link in the last sync, the mean over links of a kind.",
            ["group", "transport"],
            **options,
        )
        self._last_sync = prometheus_client.Gauge(
            "rdt_last_sync_timestamp_seconds", "When the last completed sync began.", ["group"], **options
        )
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
            self._served[group] = {
                engine: min((int(rank.get("version", 0)) for rank in ranks), default=0)
                for engine, ranks in engines.items()
            }

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Count a completed sync."""
        with self._lock:
            served = self._served.setdefault(group, {})
            behind = {failure.engine for failure in report.failures}
            engines = {*served, *(row.engine for row in report.ranks)} - behind
            served.update(dict.fromkeys(engines, report.version))
        for failure in report.failures:
            self._failures.labels(group, failure.phase, failure.error_type).inc()
        for phase in _PHASES:
            self._phase.labels(group, phase).observe(getattr(report, f"{phase}_s"))
        self._syncs.labels(group).inc()
        self._bytes.labels(group).inc(report.nbytes)
        self._last_sync.labels(group).set(report.started_unix_s)
        by_transport: dict[str, list[LinkReport]] = {}
        for row in report.ranks:
            for link in row.links:
                by_transport.setdefault(link.transport, []).append(link)
        for transport, links in by_transport.items():
            nbytes, seconds = sum(link.nbytes for link in links), sum(link.seconds for link in links)
            self._link_bytes.labels(group, transport).inc(nbytes)
            self._link_seconds.labels(group, transport).inc(seconds)
            if seconds:
                self._link_rate.labels(group, transport).set(nbytes / seconds / 1e9)

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Count a failed sync."""
        self._failures.labels(group, failure.phase, failure.error_type).inc()

    def on_closed(self, group: str) -> None:
        """The group's engines and its coordinator are no longer shown; what was counted stays."""
        with self._lock:
            self._served.pop(group, None)
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
            served = {group: dict(engines) for group, engines in self._served.items()}
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
