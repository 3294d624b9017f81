"""What is measured of syncs, once for every system that shows it: names, kinds and labels in one table.

:mod:`rdt_core.metrics` (Prometheus) and :mod:`rdt_core.ray_metrics` (Ray's own) export these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rdt_core.report import LinkReport, SyncFailure, SyncReport

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
PHASES = ("publish_wait", "prepare", "commit", "stall", "total")


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric.

    Args:
        name: with its unit; counters without the ``_total`` that exporters add.
        kind: ``counter``, ``gauge`` or ``histogram`` (of seconds, in ``BUCKETS_S``).
        description: for people.
        labels: in the order of :attr:`Sample.labels`.
    """

    name: str
    kind: str
    description: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One value: what a counter grows by, what a gauge is now, or what a histogram takes in."""

    name: str
    labels: tuple[str, ...]
    value: float


MEASURES = (
    Measure(
        "rdt_sync_phase_seconds",
        "histogram",
        "Seconds of each phase of a completed sync; stall is how long generation stood.",
        ("group", "phase"),
    ),
    Measure("rdt_syncs", "counter", "Completed syncs.", ("group",)),
    Measure(
        "rdt_sync_failures",
        "counter",
        "Syncs that ended without a commit, by the phase and the error that ended them.",
        ("group", "phase", "error_type"),
    ),
    Measure("rdt_synced_bytes", "counter", "Payload that landed in engines.", ("group",)),
    Measure("rdt_link_bytes", "counter", "Bytes that crossed links, by kind.", ("group", "transport")),
    Measure(
        "rdt_link_seconds",
        "counter",
        "Seconds that links of a kind were read, added up over links.",
        ("group", "transport"),
    ),
    Measure(
        "rdt_link_gigabytes_per_second",
        "gauge",
        "Rate of one link in the last sync, the mean over links of a kind.",
        ("group", "transport"),
    ),
    Measure("rdt_last_sync_timestamp_seconds", "gauge", "When the last completed sync began.", ("group",)),
)
"""What a driver knows of every sync. Versions are :class:`ServedVersions`."""


def measure_sync(group: str, report: SyncReport) -> Iterator[Sample]:
    """Everything that a completed sync adds, the engines that did not follow among it."""
    for failure in report.failures:
        yield from measure_failure(group, failure)
    for phase in PHASES:
        yield Sample("rdt_sync_phase_seconds", (group, phase), getattr(report, f"{phase}_s"))
    yield Sample("rdt_syncs", (group,), 1)
    yield Sample("rdt_synced_bytes", (group,), report.nbytes)
    yield Sample("rdt_last_sync_timestamp_seconds", (group,), report.started_unix_s)
    by_transport: dict[str, list[LinkReport]] = {}
    for row in report.ranks:
        for link in row.links:
            by_transport.setdefault(link.transport, []).append(link)
    for transport, links in by_transport.items():
        nbytes, seconds = sum(link.nbytes for link in links), sum(link.seconds for link in links)
        yield Sample("rdt_link_bytes", (group, transport), nbytes)
        yield Sample("rdt_link_seconds", (group, transport), seconds)
        if seconds:
            yield Sample("rdt_link_gigabytes_per_second", (group, transport), nbytes / seconds / 1e9)


def measure_failure(group: str, failure: SyncFailure) -> Iterator[Sample]:
    """What a failed sync adds."""
    yield Sample("rdt_sync_failures", (group, failure.phase, failure.error_type), 1)


class ServedVersions:
    """Which version each engine serves, as far as one driver has been told. Used under its owner's lock."""

    def __init__(self) -> None:
        self._by_group: dict[str, dict[str, int]] = {}

    def connect(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Every engine, with the version that its ranks said they hold."""
        self._by_group[group] = {
            engine: min((int(rank.get("version", 0)) for rank in ranks), default=0)
            for engine, ranks in engines.items()
        }

    def sync(self, group: str, report: SyncReport) -> None:
        """All but those that did not follow serve the report's version."""
        served = self._by_group.setdefault(group, {})
        behind = {failure.engine for failure in report.failures}
        engines = {*served, *(row.engine for row in report.ranks)} - behind
        served.update(dict.fromkeys(engines, report.version))

    def close(self, group: str) -> None:
        """Forget a group."""
        self._by_group.pop(group, None)

    def of(self, group: str) -> dict[str, int]:
        """By engine."""
        return dict(self._by_group.get(group, {}))

    def all(self) -> dict[str, dict[str, int]]:
        """By group and engine."""
        return {group: dict(served) for group, served in self._by_group.items()}
