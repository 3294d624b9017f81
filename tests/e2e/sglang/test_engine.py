"""``sglang.Engine(weight_sync="rdt")``, in a process of its own and without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.processes import ROOT, start_trainer
from tests.e2e.sglang.conftest import engine_env
from tests.e2e.sglang.engine_process import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.slow
def test_an_engine_takes_versions_by_a_method_and_answers_as_one_that_loaded_them(
    ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    first, second = checkpoint("qwen3", 0), checkpoint("qwen3", 1)
    command = [sys.executable, "-m", "tests.e2e.sglang.engine_process", str(first), "engine", ray_address]
    with (
        start_trainer("engine", ray_address, first) as trainer,
        subprocess.Popen(
            [*command, os.environ.get("RAY_AUTH_MODE", "")],
            cwd=ROOT,
            env=engine_env(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        loaded = read(process)
        seen = []
        for version, folder in enumerate((second, first), start=1):
            trainer.publish(folder, version)
            assert process.stdin is not None
            print(version, file=process.stdin, flush=True)
            seen.append(read(process))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert loaded["status"][0]["group"] is None
    assert seen[0]["answers"] != loaded["answers"]
    assert seen[1]["answers"] == loaded["answers"]
    assert [s["updated"]["weight_version"] for s in seen] == ["1", "2"]
    assert [s["status"][0]["version"] for s in seen] == [1, 2]
    assert set(seen[1]["versions"]) == {"2"}


def read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer; libraries print between."""
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith(PREFIX))
    return dict(json.loads(line.removeprefix(PREFIX)))
