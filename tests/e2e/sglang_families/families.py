"""The SGLang models of the families."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tests.e2e.processes import find_port

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def build_model(
    folder: Path,
    *,
    attention: str = "torch_native",
    tp_rank: int = 0,
    tp_size: int = 1,
    port: int | None = None,
) -> nn.Module:
    """The model class that SGLang picks for a checkpoint, built as a scheduler builds it, not loaded.

    SGLang keeps one configuration a process, and the last one counts; its groups are made once.

    Args:
        folder: of the checkpoint.
        attention: a backend; some models name those that they need, and none is made here.
        tp_rank: of this process.
        tp_size: number of tensor-parallel ranks.
        port: where the ranks meet; any free one for a single rank.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(
        model_path=str(folder),
        device="cpu",
        dtype="bfloat16",
        tp_size=tp_size,
        attention_backend=attention,
        sampling_backend="pytorch",
        grammar_backend="none",
        cuda_graph_backend_decode="disabled",
        cuda_graph_backend_prefill="disabled",
        disable_custom_all_reduce=True,
        skip_tokenizer_init=True,
    )
    server_args.resolve_once()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=tp_rank, dp_rank=None, gpu_id=0))
    if not torch.distributed.is_initialized():
        bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port or find_port())
    config = ModelConfig.from_server_args(server_args)
    bootstrap.init_layer_runtime(model_config=config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = _initialize_model(config, LoadConfig())
    finally:
        torch.set_default_dtype(default)
    return model
