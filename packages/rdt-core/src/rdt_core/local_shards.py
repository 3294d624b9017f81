"""What an exporter hands to the publisher: live views of one trainer rank's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rdt_core.manifest import TensorSpec
    from rdt_core.region import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShard:
    """A region of a checkpoint tensor and the live memory that holds it.

    Args:
        spec: checkpoint name, GLOBAL shape in elements, dtype in memory.
        region: the box held by this rank.
        data: a view of the live storage with ``data.shape == region.shape``, of any strides. The optimizer
            writes what engines read; a copy only where ``LocalShards.refresh`` fills it.
        owner: name of the trainer's own parameter, for error messages.
    """

    spec: TensorSpec
    region: Region
    data: torch.Tensor
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShards:
    """All that one trainer rank holds.

    Args:
        rank: global trainer rank.
        world_size: number of trainer ranks of the group.
        shards: live views; may be empty on a rank that holds padding only.
        locate: returns the current ``data_ptr`` of every shard in order, looked up afresh from the model,
            so that ``publish`` notices memory that moved. Takes no collective.
        refresh: makes the views hold what the optimizer last wrote, where they do not after every step.
            ``publish`` releases the last version and runs it, in the caller's thread; it may be a collective
            of trainer ranks.
        copied_bytes: of the shards that are copies beside the parameters, which ``refresh`` fills.
        known: tensors that the manifest names though this rank may hold no part of them.
    """

    rank: int
    world_size: int
    shards: tuple[LocalShard, ...]
    locate: Callable[[], tuple[int, ...]]
    refresh: Callable[[], None] | None = None
    copied_bytes: int = 0
    known: tuple[TensorSpec, ...] = ()
