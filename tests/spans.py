"""OpenTelemetry spans as the SDK writes them, and the tree that those of one sync must make."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FOLDER = "RDT_TEST_SPANS_FOLDER"
"""Environment variable: where processes of a test write their spans, a file each."""

SYNC_TREE = frozenset(
    {
        ("", "rdt.sync"),
        ("rdt.sync", "rdt.publish_wait"),
        ("rdt.publish_wait", "rdt.coordinator.wait_published"),
        ("rdt.coordinator.wait_published", "rdt.trainer.publish 0"),
        ("rdt.coordinator.wait_published", "rdt.trainer.publish 1"),
        ("rdt.sync", "rdt.prepare"),
        ("rdt.sync", "rdt.engine.prepare 0"),
        ("rdt.prepare", "rdt.coordinator.wait_prepared"),
        ("rdt.engine.prepare 0", "rdt.engine.read 0"),
        ("rdt.engine.read 0", "rdt.coordinator.begin_read"),
        ("rdt.engine.read 0", "rdt.coordinator.ask"),
        ("rdt.coordinator.ask", "rdt.trainer.digest_reads 0"),
        ("rdt.coordinator.ask", "rdt.trainer.digest_reads 1"),
        ("rdt.engine.read 0", "rdt.coordinator.end_read"),
        ("rdt.engine.read 0", "rdt.coordinator.report_prepared"),
        ("rdt.sync", "rdt.commit"),
        ("rdt.commit", "rdt.engine.commit 0"),
    }
)
"""Parent and child of every span of a staged update with ``verify="digest"``.

Of two trainer ranks and one engine rank.
"""


@dataclass(frozen=True, slots=True)
class Span:
    """What a test looks at. ``name`` has the rank behind it where there is one."""

    trace: str
    span: str
    parent: str
    name: str


def parse_span(written: Mapping[str, Any]) -> Span:
    """From the SDK's JSON."""
    rank = written["attributes"].get("rdt.rank")
    return Span(
        trace=written["context"]["trace_id"],
        span=written["context"]["span_id"],
        parent=written["parent_id"] or "",
        name=written["name"] if rank is None else f"{written['name']} {rank}",
    )


def missing_names(spans: Iterable[Span]) -> set[str]:
    """Spans of the tree that have not been written yet; processes write theirs when they end."""
    return {child for _, child in SYNC_TREE} - {span.name for span in spans}


def edges_of(spans: Iterable[Span]) -> set[tuple[str, str]]:
    """Parent and child of every span of the one trace that has a sync; other parents by their id."""
    found = list(spans)
    traces = {span.trace for span in found if span.name == "rdt.sync"}
    assert len(traces) == 1, "one sync, one trace"
    ours = [span for span in found if span.trace in traces and span.name.startswith("rdt.")]
    name_of = {span.span: span.name for span in ours}
    return {(name_of.get(span.parent, span.parent), span.name) for span in ours}


def is_wanted() -> bool:
    """Whether this process was started by a test that wants its spans."""
    return FOLDER in os.environ


def write_to_folder() -> None:
    """Have the SDK write every span of this process to its file when it ends. Ray calls this by name."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    file = (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a")
    exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def read_folder(folder: Path) -> dict[str, list[Span]]:
    """By file, which is by process, what has been written so far."""
    return {
        file.name: [
            parse_span(json.loads(line))
            for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        for file in sorted(folder.glob("*.jsonl"))
    }
