"""Placements over a mesh, and the region of a tensor that one rank holds under them.

The pure counterpart of DTensor's placements: the simulator, the tests and the exporters' tests describe
layouts with it. ``ShardDim`` is DTensor's ``Shard(dim)`` under a name that does not clash with
:class:`rdt_core.manifest.Shard`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank along the mesh axis holds the same."""


@dataclass(frozen=True, slots=True)
class ShardDim:
    """The tensor's dim is cut into one chunk a rank along the mesh axis, as ``torch.chunk`` cuts."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShardDim:
    """A chunk of a chunk: the dim is first cut by *later* mesh axes, ``split_factor`` chunks in all.

    This is what FSDP2 over tensor parallelism makes: its mesh axis comes first, yet it cuts what tensor
    parallelism left on the rank. Where the dim does not divide evenly, this is the memory that FSDP2 lays
    out; DTensor's own offsets then name other rows.

    Source: ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``, ``FSDPParam._init_sharded_param``,
    and ``torch/distributed/tensor/placement_types.py``, ``_StridedShard``.
    """

    dim: int
    split_factor: int


Placement: TypeAlias = Replicate | ShardDim | StridedShardDim


def local_region(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Region:
    """The region held by the rank at ``coordinate``; empty when the chunks ran out before it.

    Args:
        shape: global shape of the tensor in elements.
        mesh_shape: ranks along every mesh axis.
        coordinate: the rank's place along every mesh axis.
        placements: one a mesh axis.

    Raises:
        ValueError: lengths differ, a coordinate or dim is out of range, or a ``split_factor`` is not the
            number of chunks that later axes make of its dim, so that no single region holds the shard.
    """
    _check_mesh(shape, mesh_shape, coordinate, placements)
    region = Region.whole(shape)
    for axis in _cutting_order(mesh_shape, placements):
        placement = placements[axis]
        if not isinstance(placement, Replicate):
            region = _cut_chunk(region, placement.dim, mesh_shape[axis], coordinate[axis])
    return region


def _cut_chunk(region: Region, dim: int, num_chunks: int, index: int) -> Region:
    first, last = region.start[dim], region.stop[dim]
    chunk = -(-(last - first) // num_chunks)
    start = min(first + index * chunk, last)
    stop = min(start + chunk, last)
    return Region(
        (*region.start[:dim], start, *region.start[dim + 1 :]),
        (*region.stop[:dim], stop, *region.stop[dim + 1 :]),
    )


def _cutting_order(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> list[int]:
    """Mesh axes in the order in which they cut: plain ones left to right, then strided ones right to left."""
    plain = [axis for axis, placement in enumerate(placements) if not isinstance(placement, StridedShardDim)]
    strided = []
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, StridedShardDim):
            _check_split_factor(axis, placement, mesh_shape, placements)
            strided.append(axis)
    return plain + strided


def _check_split_factor(
    axis: int, placement: StridedShardDim, mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> None:
    before = [
        other
        for other, held in enumerate(placements)
        if not isinstance(held, Replicate)
        and held.dim == placement.dim
        and (other > axis or (other < axis and isinstance(held, ShardDim)))
    ]
    num_chunks = math.prod(mesh_shape[other] for other in before)
    if num_chunks != placement.split_factor or any(other < axis for other in before):
        raise ValueError(
            f"split_factor {placement.split_factor} of mesh axis {axis} needs later axes that cut dim "
            f"{placement.dim} into as many chunks, and no plain shard of that dim before it; got placements "
            f"{tuple(placements)} over mesh {tuple(mesh_shape)}"
        )


def _check_mesh(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> None:
    if not len(mesh_shape) == len(coordinate) == len(placements):
        raise ValueError(f"mesh {mesh_shape}, coordinate {coordinate} and {placements} differ in length")
    if any(not 0 <= at < ranks for at, ranks in zip(coordinate, mesh_shape, strict=True)):
        raise ValueError(f"coordinate {tuple(coordinate)} is outside of mesh {tuple(mesh_shape)}")
    for placement in placements:
        if not isinstance(placement, Replicate) and not 0 <= placement.dim < len(shape):
            raise ValueError(f"{placement} has no dim in shape {tuple(shape)}")
