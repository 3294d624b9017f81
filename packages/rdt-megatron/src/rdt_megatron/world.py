"""The trainer ranks of a group, as torch.distributed numbers them."""

from __future__ import annotations

import torch.distributed as dist


def rank_and_size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in a group, by default the whole world, and the group's size; alone without one."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)
