"""What a scheduler records before it serves, and when a connect may rely on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: its loaders cannot be recorded")

import torch

from rdt_core.model_thread import ModelThread
from rdt_sglang.checkpoint import read_specs
from rdt_sglang.model import SglangModel
from tests.e2e.family_checkpoints import load_checkpoint, save_checkpoint
from tests.e2e.sglang_families.families import build_model
from tests.integration.loader_models import specs_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # SGLang and transformers deprecate among themselves
def test_a_recording_is_used_again_until_tensors_or_the_places_of_parameters_change(tmp_path: Path) -> None:
    save_checkpoint("Llama", tmp_path)
    specs = read_specs(tmp_path)
    assert sorted(specs_of(load_checkpoint(tmp_path)), key=lambda spec: spec.name) == list(specs)
    model = build_model(tmp_path)
    config = SimpleNamespace(dtype=torch.bfloat16)
    runner = SimpleNamespace(model=model, model_config=config)
    rank = SglangModel(SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)), ModelThread())
    ahead = rank.record(specs)
    assert rank.num_recorded == len(specs)
    assert rank.record(list(specs)) is ahead
    wider = [replace(spec, dtype="float32") for spec in specs]
    assert rank.record(wider) is not ahead
    again = rank.record(specs)
    name, parameter = next(iter(model.named_parameters()))
    parameter.data = parameter.data.clone()
    moved = rank.record(specs)
    assert moved is not again
    assert moved.windows[name].data_ptr() == parameter.data_ptr()
