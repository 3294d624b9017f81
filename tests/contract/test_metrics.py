"""Metrics of syncs, as Prometheus reads them, and the dashboard that shows them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.errors import CoordinatorLostError, NotPublishedError
from rdt_core.report import SyncFailure, SyncReport
from tests.local_group import local_group

prometheus_client = pytest.importorskip(
    "prometheus_client", reason="prometheus_client is not installed; `nox -s env-torch` brings it"
)

from rdt_core.metrics import SyncMetrics  # noqa: E402  it needs prometheus_client

if TYPE_CHECKING:
    from collections.abc import Iterator

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"


class Fed:
    """A registry after two syncs and one failure of two engines, one version behind the trainers."""

    def __init__(self, registry: Any, metrics: SyncMetrics, engines: list[str], nbytes: int) -> None:
        self.registry, self.metrics, self.engines, self.nbytes = registry, metrics, engines, nbytes

    def value(self, name: str, **labels: str) -> float | None:
        value: float | None = self.registry.get_sample_value(name, {"group": "policy", **labels})
        return value


@pytest.fixture(scope="module")
def fed() -> Iterator[Fed]:
    registry = prometheus_client.CollectorRegistry()
    metrics = SyncMetrics(registry)
    with (
        local_group() as group,
        group.serve_engine() as one,
        group.serve_engine() as two,
        group.connect(one, two, observers=[metrics]) as sync,
    ):
        metrics.watch("policy", sync.status)
        reports = [sync.update(group.write_and_publish()) for _ in range(2)]
        with pytest.raises(NotPublishedError):
            sync.update(group.version + 1, timeout_s=0.1)
        group.write_and_publish()
        sync._client.wait_published(group.version, 10.0)
        yield Fed(registry, metrics, [one, two], sum(report.nbytes for report in reports))


def test_syncs_bytes_and_failures_are_counted(fed: Fed) -> None:
    assert fed.value("rdt_syncs_total") == 2
    assert fed.value("rdt_synced_bytes_total") == fed.nbytes
    failed = {"phase": "publish_wait", "error_type": "NotPublishedError"}
    assert fed.value("rdt_sync_failures_total", **failed) == 1


@pytest.mark.parametrize("phase", ["publish_wait", "prepare", "commit", "stall", "total"])
def test_every_phase_has_a_histogram(fed: Fed, phase: str) -> None:
    assert fed.value("rdt_sync_phase_seconds_count", phase=phase) == 2
    assert fed.value("rdt_sync_phase_seconds_bucket", phase=phase, le="+Inf") == 2
    assert (fed.value("rdt_sync_phase_seconds_sum", phase=phase) or 0) > 0


def test_bytes_and_rate_are_told_by_kind_of_link(fed: Fed) -> None:
    assert fed.value("rdt_link_bytes_total", transport="memory") == fed.nbytes
    assert (fed.value("rdt_link_gigabytes_per_second", transport="memory") or 0) > 0


def test_versions_and_staleness_are_told_by_engine_at_the_scrape(fed: Fed) -> None:
    assert fed.value("rdt_trainer_version") == 3
    for engine in fed.engines:
        assert fed.value("rdt_engine_version", engine=engine) == 2
        assert fed.value("rdt_staleness_versions", engine=engine) == 1
    assert fed.value("rdt_trainer_ranks", state="alive") == 2
    assert fed.value("rdt_engine_ranks") == 2
    assert fed.value("rdt_leases") == 0
    assert fed.value("rdt_coordinator_up") == 1


def test_a_coordinator_that_does_not_answer_is_down_and_breaks_no_scrape() -> None:
    registry = prometheus_client.CollectorRegistry()
    metrics = SyncMetrics(registry)

    def status() -> dict[str, Any]:
        raise CoordinatorLostError("policy", "its node died")

    metrics.watch("policy", status)
    assert registry.get_sample_value("rdt_coordinator_up", {"group": "policy"}) == 0
    metrics.on_closed("policy")
    assert registry.get_sample_value("rdt_coordinator_up", {"group": "policy"}) is None
    metrics.close()
    metrics.close()


def test_an_engine_that_did_not_follow_keeps_its_version_and_is_a_failure() -> None:
    registry = prometheus_client.CollectorRegistry()
    metrics = SyncMetrics(registry)
    metrics.on_connected("policy", {"http://a": [{}], "http://b": [{}]})
    failure = SyncFailure(
        version=4,
        phase="prepare",
        error_type="PullTimeoutError",
        message="too slow",
        engine="http://b",
        rank=0,
        started_unix_s=0.0,
        seconds=1.0,
    )
    report = SyncReport(
        version=4,
        num_tensors=1,
        nbytes=1,
        publish_wait_s=0.0,
        prepare_s=1.0,
        commit_s=0.0,
        stall_s=0.0,
        total_s=1.0,
        ranks=(),
        failures=(failure,),
    )
    metrics.on_synced("policy", report)
    served = {
        engine: registry.get_sample_value("rdt_engine_version", {"group": "policy", "engine": engine})
        for engine in ("http://a", "http://b")
    }
    assert served == {"http://a": 4, "http://b": 0}
    labels = {"group": "policy", "phase": "prepare", "error_type": "PullTimeoutError"}
    assert registry.get_sample_value("rdt_sync_failures_total", labels) == 1


def load_dashboard_module() -> Any:
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_metric_and_label_that_the_dashboard_names_exists(fed: Fed) -> None:
    samples = [sample for family in fed.registry.collect() for sample in family.samples]
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((GRAFANA / "rdt.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"]]
    for expression in expressions:
        named = set(re.findall(r"rdt_\w+", expression))
        assert named, expression
        for name in named:
            assert name in labels, f"{name} of {expression!r} is not exported"
            used = set(re.findall(r"(\w+)=~?\"", expression)) | {
                label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")
            }
            assert used <= labels[name] | {"le"}, expression


def test_the_dashboard_file_is_what_its_script_writes() -> None:
    assert json.loads((GRAFANA / "rdt.json").read_text()) == load_dashboard_module().make_dashboard()
