"""``--weight-sync rdt``, as SGLang's user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.processes import ROOT, find_port
from tests.e2e.sglang.conftest import breakable, engine_env, server_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = ["--model-path", "m"]


def parse(cases: dict[str, list[str]], *options: str) -> dict[str, Any]:
    """What a process that has loaded SGLang's plugins makes of command lines, in order."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.sglang.parse_flags", *options],
        cwd=ROOT,
        env=engine_env(),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def absent() -> dict[str, Any]:
    return parse({"absent": MODEL})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config: Path = tmp_path_factory.mktemp("flag") / "config.yaml"
    config.write_text("weight-sync: rdt\n")
    return parse(
        {
            "bad": [*MODEL, "--weight-sync", "nccl"],
            "pipeline": [*MODEL, "--weight-sync", "rdt", "--pp-size", "2"],
            "nodes": [*MODEL, "--weight-sync", "rdt", "--pp-size", "2", "--nnodes", "2"],
            "help": ["--help"],
            "given": [*MODEL, "--weight-sync", "rdt"],
            "equals": [*MODEL, "--weight-sync=rdt"],
            "config": [*MODEL, "--config", str(config)],
        }
    )


def test_without_the_flag_nothing_of_sglang_changes(absent: dict[str, Any]) -> None:
    assert absent["cases"]["absent"]["chosen"] is False
    assert absent["before"] == absent["after"] == []


@pytest.mark.parametrize("form", ["given", "equals", "config"])
def test_every_way_to_give_the_flag_chooses_weight_sync(report: dict[str, Any], form: str) -> None:
    assert report["cases"][form]["chosen"] is True, report["cases"][form]["output"]
    assert report["before"] == []
    assert report["after"] == ["init_communicators", "communicators", "messages"]


def test_a_bad_value_is_refused_with_the_choices(report: dict[str, Any]) -> None:
    case = report["cases"]["bad"]
    assert case["exit"] == 2
    assert "argument --weight-sync: invalid choice: 'nccl'" in case["output"]


def test_what_cannot_be_served_is_refused_before_anything_starts(report: dict[str, Any]) -> None:
    assert report["cases"]["pipeline"]["chosen"] is True, report["cases"]["pipeline"]["output"]
    assert "a pipeline over several nodes is not supported" in report["cases"]["nodes"]["exit"]


def test_help_shows_the_flag(report: dict[str, Any]) -> None:
    case = report["cases"]["help"]
    assert case["exit"] == 0
    assert "--weight-sync" in case["output"]


def test_an_sglang_without_a_place_for_a_hook_is_refused_in_one_sentence() -> None:
    case = parse({"given": [*MODEL, "--weight-sync", "rdt"]}, "--without-hook")["cases"]["given"]
    assert case["chosen"] is None
    (line,) = case["exit"].splitlines()
    assert "has no sglang.srt.managers.tokenizer_control_mixin" in line


@pytest.mark.slow
def test_a_server_whose_scheduler_took_no_hook_ends_with_one_sentence_that_names_it(
    checkpoint: Callable[[str, int], Path], tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.write_text("no hook")
    done = subprocess.run(
        server_command(checkpoint("qwen3", 0), find_port(), ["--weight-sync", "rdt"]),
        cwd=ROOT,
        env=engine_env() | breakable(fault),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: --weight-sync rdt: ")]
    assert len(said) == 1, done.stderr[-4000:]
    assert "has no sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher" in said[0]
