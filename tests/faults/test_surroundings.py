"""Nodes, disks and limits that fail under a group; each scenario is a process, see ``surroundings``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.faults.cells import LIMIT_S, SURROUNDINGS, Cell
from tests.faults.results import Row
from tests.faults.surroundings import ANSWER
from tests.integration.conftest import ROOT

if TYPE_CHECKING:
    from tests.faults.results import Recorder

SCENARIO_TIMEOUT_S = 280.0


@pytest.mark.parametrize("cell", SURROUNDINGS, ids=lambda cell: str(cell.name))
def test_what_the_user_sees_when_the_surroundings_fail(cell: Cell, recorder: Recorder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.surroundings", cell.victim, cell.fault, cell.point],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
        timeout=SCENARIO_TIMEOUT_S,
        check=False,
    )
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    assert answers, f"the scenario ended with {done.returncode}"
    answer = json.loads(answers[-1])
    if "impossible" in answer:
        pytest.skip(answer["impossible"])
    row = Row(**answer)
    recorder.keep(cell.name, row)
    assert cell.allows(row.sees, row.serves), row
    assert row.seconds < LIMIT_S
