"""One trace a sync: driver, coordinator, trainer ranks and engine rank, each a process with the real SDK."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import spans

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0

pytest.importorskip(
    "opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed; `nox -s env-torch` brings it"
)


def test_five_processes_write_one_tree_of_spans(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, spans.FOLDER: str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.integration.traced_sync"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    by_process = spans.read_folder(tmp_path)
    assert spans.edges_of(itertools.chain(*by_process.values())) == spans.SYNC_TREE
    # Who opened which: no process stands in for another.
    parties = [
        {span.name.split()[0].rpartition(".")[0] for span in found if span.name.startswith("rdt.")}
        for found in by_process.values()
    ]
    assert sorted(party for found in parties for party in found) == [
        "rdt",
        "rdt.coordinator",
        "rdt.engine",
        "rdt.trainer",
        "rdt.trainer",
    ]


SEEDED_ALIKE = """
import random
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from rdt_core.tracing import span, traceparent

trace.set_tracer_provider(TracerProvider())
for rank in range(2):
    random.seed(0)
    with span("rdt.engine.read", rank=rank):
        print(traceparent())
"""


def test_ranks_whose_random_numbers_are_alike_give_their_spans_ids_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEEDED_ALIKE], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    parents = [line.split("-") for line in done.stdout.splitlines()]
    assert len({trace for _, trace, _, _ in parents}) == len({span for _, _, span, _ in parents}) == 2
