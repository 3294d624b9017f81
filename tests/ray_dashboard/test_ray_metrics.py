"""Metrics of syncs as Ray's agent exports them: a real cluster with ``ray[default]``, scraped over HTTP."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import httpx
import pytest

from rdt_core.errors import NotPublishedError
from rdt_core.measures import MEASURES
from rdt_core.ray_metrics import RaySyncMetrics
from tests.local_group import free_port, local_group, wait_for
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("opencensus", reason="ray[default] is not installed; `nox -s ray-metrics` brings it")

SCRAPE_TIMEOUT_S = 120.0


class Scrape:
    """What the agent exports now, by metric and by those labels that are not Ray's own."""

    def __init__(self, port: int) -> None:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30.0).text
        self.values: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
        for name, labels, value in re.findall(r"^ray_(rdt_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            ours = {
                (key, content)
                for key, content in re.findall(r'(\w+)="([^"]*)"', labels)
                if key in ("group", "phase", "error_type", "transport", "engine", "le")
            }
            self.values[name][frozenset(ours)] = float(value)

    def value(self, name: str, **labels: str) -> float | None:
        return self.values[name].get(frozenset({"group": "policy", **labels}.items()))


@pytest.fixture(scope="module")
def fed() -> Iterator[tuple[Scrape, str, int]]:
    """A scrape after two syncs and a failed one, the engine, and the bytes that were synced."""
    port = free_port()
    with local_ray(metrics_port=port), local_group() as group, group.serve_engine() as engine:
        with group.connect(engine, observers=[RaySyncMetrics()]) as sync:
            nbytes = sum(sync.update(group.write_and_publish()).nbytes for _ in range(2))
            with pytest.raises(NotPublishedError):
                sync.update(group.version + 1, timeout_s=0.1)

        def is_exported() -> bool:
            try:
                return Scrape(port).value("rdt_syncs_total") == 2
            except httpx.HTTPError:
                return False  # the agent takes seconds to start

        wait_for(is_exported, SCRAPE_TIMEOUT_S)
        yield Scrape(port), engine, nbytes


def test_rays_endpoint_has_every_metric_by_the_name_that_prometheus_has(
    fed: tuple[Scrape, str, int],
) -> None:
    scrape, _, _ = fed
    suffix = {"counter": "_total", "gauge": "", "histogram": "_count"}
    names = {measure.name + suffix[measure.kind] for measure in MEASURES}
    assert names <= set(scrape.values)


def test_rays_endpoint_has_the_values_of_the_syncs(fed: tuple[Scrape, str, int]) -> None:
    scrape, engine, nbytes = fed
    assert scrape.value("rdt_syncs_total") == 2
    assert scrape.value("rdt_synced_bytes_total") == nbytes
    assert scrape.value("rdt_link_bytes_total", transport="memory") == nbytes
    failed = {"phase": "publish_wait", "error_type": "NotPublishedError"}
    assert scrape.value("rdt_sync_failures_total", **failed) == 1
    assert scrape.value("rdt_sync_phase_seconds_count", phase="commit") == 2
    assert scrape.value("rdt_engine_version", engine=engine) == 2
    assert scrape.value("rdt_trainer_version") == 2
    assert scrape.value("rdt_staleness_versions", engine=engine) == 0
