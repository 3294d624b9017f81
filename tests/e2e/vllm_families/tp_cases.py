"""What each of two tensor-parallel ranks does; run by :mod:`tests.integration.rank_world`."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.e2e.family_checkpoints import load_checkpoint, save_checkpoint
from tests.e2e.family_examination import examine
from tests.e2e.vllm_families.families import build_model, join_vllm

TP_SIZE = 2


def gpt_oss() -> dict[str, Any]:
    """Its loader zeroes a checkpoint tensor on all ranks but the first."""
    return examine_shard("gpt-oss")


def qwen3_moe() -> dict[str, Any]:
    return examine_shard("Qwen3-MoE")


def phi3() -> dict[str, Any]:
    return examine_shard("Phi-3")


def examine_shard(family: str) -> dict[str, Any]:
    join_world()
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made, src=0)
    folder = Path(made[0])
    try:
        save_checkpoint(family, folder)
        dist.barrier()
        row = examine(family, build_model(folder, TP_SIZE), load_checkpoint(folder))
    finally:
        dist.barrier()
        shutil.rmtree(folder, ignore_errors=True)
    return {"row": str(row), "differing": row.differing, "reload": row.reload}


@functools.cache
def join_world() -> None:
    join_vllm(dist.get_rank(), TP_SIZE)
