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
