"""Refuses CUDA memory that no other process can map, at attach and by the parameter's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rdt_core.errors import UnsupportedLayoutError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.local_shards import LocalShards


def refuse_expandable(local: LocalShards) -> None:
    """Called by ``WeightPublisher.attach``. Looks at the allocator's own list, for CUDA memory only.

    Raises:
        UnsupportedLayoutError: a parameter lies in an expandable segment.
    """
    held = [shard for shard in local.shards if shard.data.is_cuda]
    # Other allocators keep no such list, and have no such segments.
    if not held or torch.cuda.get_allocator_backend() != "native":
        return
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch has no annotation there
    index = find_expandable([shard.data.data_ptr() for shard in held], segments)
    if index is not None:
        raise UnsupportedLayoutError(
            held[index].owner,
            local.rank,
            "it lies in an expandable segment, which no other process can map",
            "Take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF) there.",
        )


def find_expandable(addresses: Sequence[int], segments: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the first address that lies in an expandable segment; None when none does.

    Args:
        addresses: of device memory.
        segments: as ``torch.cuda.memory_snapshot`` gives them (2.13): ``address``, ``total_size`` in bytes,
            ``is_expandable``.
    """
    spans = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in segments
        if segment["is_expandable"]
    ]
    return next(
        (i for i, at in enumerate(addresses) if any(start <= at < stop for start, stop in spans)), None
    )
