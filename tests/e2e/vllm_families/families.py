"""The vLLM models of the families."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def start_vllm(folder: Path) -> None:
    """Make this process a world of one. vLLM's groups may be made once a process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    join_vllm(0, 1)


def join_vllm(rank: int, tp_size: int) -> None:
    """Make vLLM's groups in a torch.distributed world whose ranks are all tensor-parallel ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(tp_size, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(tp_size, 1)


def stop_vllm() -> None:
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _register_here(folder: Path) -> None:
    """Give vLLM the checkpoint's model class; it would first inspect it in a process of its own, for 7 s."""
    from vllm import ModelRegistry

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def build_model(folder: Path, tp_size: int = 1) -> nn.Module:
    """The model class that vLLM picks for a checkpoint, built as a worker builds it, not loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    _register_here(folder)
    config = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=tp_size,
        max_model_len=64,
    ).create_engine_config()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = initialize_model(config)
    finally:
        torch.set_default_dtype(default)
    return model
