"""``vllm serve --weight-sync rdt``, as its user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.processes import ROOT
from tests.e2e.vllm.conftest import ENGINE_ENV

MIDDLEWARE = "rdt_vllm.routes.WeightSyncMiddleware"
NCCL = '{"backend": "nccl"}'
CASES = {
    "absent": ["m"],
    "dash": ["m", "--weight-sync", "rdt"],
    "underscore": ["m", "--weight_sync", "rdt"],
    "equals": ["m", "--weight-sync=rdt"],
    "config_file": ["m", "--config", "CONFIG"],
    "before_middleware": ["m", "--weight-sync", "rdt", "--middleware", "other.Middleware"],
    "after_middleware": ["m", "--middleware", "other.Middleware", "--weight-sync", "rdt"],
    "bad_value": ["m", "--weight-sync", "nccl"],
    "transfer_config": ["m", "--weight-transfer-config", NCCL],
    "then_transfer_config": ["m", "--weight-sync", "rdt", "--weight-transfer-config", NCCL],
    "after_transfer_config": ["m", "--weight-transfer-config", NCCL, "--weight-sync", "rdt"],
    "dotted_transfer_config": ["m", "--weight-sync", "rdt", "--weight-transfer-config.backend", "nccl"],
    "help": ["--help=weight-sync"],
    "help_all": ["--help=all"],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case parsed by one process that has loaded vLLM's plugins."""
    config = tmp_path_factory.mktemp("flag") / "config.yaml"
    config.write_text("weight-sync: rdt\n")
    cases = {name: [str(config) if a == "CONFIG" else a for a in args] for name, args in CASES.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.vllm.parse_flags"],
        cwd=ROOT,
        env={**os.environ, **ENGINE_ENV},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("form", ["dash", "underscore", "equals", "config_file"])
def test_every_way_to_give_the_flag_chooses_the_backend(report: dict[str, Any], form: str) -> None:
    assert report["cases"][form] == {
        "exit": None,
        "weight_sync": "rdt",
        "backend": "rdt",
        "middleware": [MIDDLEWARE],
    }


@pytest.mark.parametrize("form", ["before_middleware", "after_middleware"])
def test_the_flag_keeps_the_users_middleware(report: dict[str, Any], form: str) -> None:
    assert sorted(report["cases"][form]["middleware"]) == ["other.Middleware", MIDDLEWARE]


def test_without_the_flag_nothing_is_chosen(report: dict[str, Any]) -> None:
    nothing: dict[str, Any] = {"exit": None, "weight_sync": None, "backend": None, "middleware": []}
    assert report["cases"]["absent"] == nothing
    assert report["cases"]["transfer_config"] == {**nothing, "backend": "nccl"}


def test_registering_changes_no_function_of_vllm_that_serves_or_loads(report: dict[str, Any]) -> None:
    assert report["changed"] == []
    assert report["is_offered"]
    assert report["is_idempotent"]


def test_a_bad_value_is_refused_with_the_choices(report: dict[str, Any]) -> None:
    case = report["cases"]["bad_value"]
    assert case["exit"] == 2
    assert "argument --weight-sync: invalid choice: 'nccl'" in case["output"]
    assert "'rdt'" in case["output"]


@pytest.mark.parametrize("form", ["then_transfer_config", "after_transfer_config", "dotted_transfer_config"])
def test_the_flag_and_a_transfer_config_are_refused_together_in_one_sentence(
    report: dict[str, Any], form: str
) -> None:
    case = report["cases"][form]
    assert case["exit"] == 2
    (error,) = [line for line in case["output"].splitlines() if "error:" in line]
    assert "--weight-transfer-config" in error
    assert "not allowed with" in error
    assert "--weight-sync" in error


@pytest.mark.parametrize("form", ["help", "help_all"])
def test_help_shows_the_flag(report: dict[str, Any], form: str) -> None:
    case = report["cases"][form]
    assert case["exit"] == 0
    assert "--weight-sync" in case["output"]
    assert "/rdt/*" in case["output"]
