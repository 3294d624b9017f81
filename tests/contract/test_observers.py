"""What a driver tells its observers, its coordinator and the open trace about every sync."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from rdt_core.client import CoordinatorClient, LocalChannel
from rdt_core.coordinator import MAX_HISTORY
from rdt_core.errors import NotPublishedError, UpdateFailedError
from tests.contract.notes import Notes
from tests.local_group import LocalGroup, local_group, wait_for
from tests.spans import SYNC_TREE, Span, edges_of, missing_names, parse_span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from rdt_core.report import SyncReport


class Broken(Notes):
    """An observer with a bug."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        raise KeyError(group)


@pytest.fixture(scope="module")
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


def test_an_observer_is_told_of_connect_syncs_failures_and_close(group: LocalGroup) -> None:
    notes = Notes()
    with group.serve_engine() as engine, group.connect(engine, observers=[Broken(), notes]) as sync:
        report = sync.update(group.write_and_publish())
        with pytest.raises(NotPublishedError):
            sync.update(group.version + 1, timeout_s=0.1)
    assert [name for name, _ in notes.events] == ["connected", "synced", "failed", "closed"]
    assert notes.of("connected") == [("policy", [engine])]
    assert notes.of("synced") == [("policy", report)]
    ((_, failure),) = notes.of("failed")
    assert (failure.version, failure.phase) == (group.version + 1, "publish_wait")
    assert failure.error_type == "NotPublishedError"


def test_a_failure_names_the_phase_the_engine_the_rank_and_the_reason(group: LocalGroup) -> None:
    notes = Notes()
    with group.serve_engine() as engine, group.connect(engine, observers=[notes]) as sync:
        group.trainers[1].publisher._exports.close()
        with pytest.raises(UpdateFailedError):
            sync.update(group.write_and_publish())
    ((_, failure),) = notes.of("failed")
    assert (failure.phase, failure.engine, failure.rank) == ("prepare", engine, 0)
    assert failure.error_type == "SourceDiedError"


def test_a_report_says_who_read_what_from_whom_and_when(group: LocalGroup) -> None:
    before = time.time()
    with group.serve_engine() as engine, group.connect(engine) as sync:
        report = sync.update(group.write_and_publish())
    (row,) = report.ranks
    assert sorted(link.trainer_rank for link in row.links) == [0, 1]
    assert {link.transport for link in row.links} == {"memory"}
    assert sum(link.nbytes for link in row.links) == row.read_nbytes
    assert sum(link.num_reads for link in row.links) == row.num_reads
    starts = [row.prepare_started_unix_s, *(link.started_unix_s for link in row.links)]
    assert before <= report.started_unix_s <= starts[0]
    assert starts == sorted(starts)
    assert starts[-1] <= row.commit_started_unix_s <= time.time()


def test_the_coordinator_keeps_the_last_syncs_and_the_rows_of_the_last_completed_one(
    group: LocalGroup,
) -> None:
    client = CoordinatorClient(group.channel)
    with group.serve_engine() as engine, group.connect(engine) as sync:
        first = sync.update(group.write_and_publish()).version
        sync.update(group.write_and_publish())
        with pytest.raises(NotPublishedError):
            sync.update(first + 2, timeout_s=0.1)
        wait_for(lambda: client.history()[-1]["version"] == first + 2)
    kept = client.history()[-3:]
    assert [(sync["outcome"], sync["version"]) for sync in kept] == [
        ("synced", first),
        ("synced", first + 1),
        ("failed", first + 2),
    ]
    assert ["ranks" in sync for sync in kept] == [False, True, False]
    assert sorted(link["trainer_rank"] for link in kept[1]["ranks"][0]["links"]) == [0, 1]


def test_the_coordinator_keeps_no_more_than_it_promises() -> None:
    channel = LocalChannel("history")
    client = CoordinatorClient(channel)
    for version in range(MAX_HISTORY + 5):
        client.start_record({"outcome": "synced", "version": version})
    wait_for(lambda: client.history()[-1]["version"] == MAX_HISTORY + 4)
    assert [sync["version"] for sync in client.history()] == list(range(5, MAX_HISTORY + 5))
    channel.end()


def test_the_spans_of_all_parties_of_a_sync_are_one_tree(group: LocalGroup) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="OpenTelemetry's API is not installed")
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    with group.serve_engine() as engine, group.connect(engine) as sync:
        spans.clear()
        for _ in range(2):
            sync.update(group.write_and_publish(), verify="digest")
            wait_for(lambda: not missing_names(as_spans(spans)))
            assert edges_of(as_spans(spans)) == SYNC_TREE
            spans.clear()


def as_spans(exporter: InMemorySpanExporter) -> list[Span]:
    return [parse_span(json.loads(span.to_json())) for span in exporter.get_finished_spans()]
