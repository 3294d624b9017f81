"""Expert weights that SGLang packs in place after a load, and unpacks before the next one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: its layers cannot be packed")

import torch

from rdt_core.error_wire import from_wire
from rdt_core.errors import CannotLendError
from rdt_core.model_thread import ModelThread
from rdt_sglang.model import SglangModel
from tests.e2e.family_checkpoints import load_checkpoint, save_checkpoint
from tests.e2e.sglang_families.families import build_model
from tests.integration.loader_models import picture, replay, specs_of

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"moe_intermediate_size": 64}  # a row of bf16 is one of the kernel's blocks


@pytest.fixture
def permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flashinfer is not installed: an order of rows and a block layout of the same kind as its own.

    Source: flashinfer/fused_moe/core.py, convert_to_block_layout. What packs and unpacks is SGLang's.
    """
    core: Any = ModuleType("flashinfer.fused_moe.core")

    def permute_rows(cache: object, tile: torch.Tensor, epilogue: int, **more: object) -> torch.Tensor:
        del cache, epilogue, more
        return torch.randperm(tile.shape[0], generator=torch.Generator().manual_seed(tile.shape[0]))

    def to_blocks(tile: torch.Tensor, block: int) -> torch.Tensor:
        rows, nbytes = tile.shape
        return tile.view(rows, nbytes // block, block).permute(1, 0, 2).contiguous()

    core._maybe_get_cached_w3_w1_permute_indices = permute_rows
    core.get_w2_permute_indices_with_cache = permute_rows
    core.convert_to_block_layout = to_blocks
    monkeypatch.setitem(sys.modules, core.__name__, core)


def schedule_packed(folder: Path) -> SimpleNamespace:
    """As much of a scheduler as a rank's model needs, around a real model whose experts are packed."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    save_checkpoint("Qwen3-MoE", folder, **SIZES)
    model = build_model(folder)
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "use_flashinfer_trtllm_moe"):
            method.use_flashinfer_trtllm_moe = True
    nothing: dict[str, Any] = dict.fromkeys(
        ("gpu_id", "model_config", "update_model_fields", "recapture_cuda_graph", "get_model_runner")
    )
    updater = WeightUpdater(
        tp_rank=0, device="cpu", custom_weight_loaders={}, get_model=lambda: model, **nothing
    )
    runner = SimpleNamespace(
        model=model, model_config=SimpleNamespace(dtype=torch.bfloat16), weight_updater=updater
    )
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # SGLang and transformers deprecate among themselves
@pytest.mark.usefixtures("permutations")
def test_packed_experts_are_unpacked_for_a_recording_and_for_a_commit_and_packed_again(
    tmp_path: Path,
) -> None:
    scheduler = schedule_packed(tmp_path)
    tensors = load_checkpoint(tmp_path)
    model = scheduler.tp_worker.model_runner.model
    updater = scheduler.tp_worker.model_runner.weight_updater

    def load(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
        """What SGLang's own update leaves."""
        updater.begin_weight_update()
        rank.load((name, tensor.clone()) for name, tensor in values.items())
        updater.end_weight_update(run_post_load=False)
        return picture(model)

    rank = SglangModel(scheduler, ModelThread())
    assert rank.is_packed
    later = {name: tensor.flip(0) for name, tensor in tensors.items()}
    expected = load(later)
    before = load(tensors)
    recording = rank.record(specs_of(tensors))
    assert picture(model) == before
    with rank.unpacked():
        assert picture(model) != before
        replay(recording, later, rank.load)
        rank.finalize()
    assert picture(model) == expected != before
    assert rank.record(specs_of(tensors)) is recording


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("permutations")
def test_a_rank_whose_experts_are_packed_lends_nothing(tmp_path: Path) -> None:
    from rdt_sglang.engine import SchedulerReceiver

    # Made without what a running scheduler is hooked for: what refuses is asked before any of that.
    receiver: Any = SchedulerReceiver.__new__(SchedulerReceiver)
    receiver._model = SglangModel(schedule_packed(tmp_path), ModelThread())
    answer = receiver._answer("lend", {"version": 1})
    with pytest.raises(CannotLendError, match="packed for a kernel"):
        raise from_wire(answer["error"])
