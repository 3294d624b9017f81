"""Which box of a tensor a DTensor's rank holds; pure arithmetic on its placements.

DTensor's own answer gives the first index in every dim only, which is wrong without notice where a rank
holds several separate runs of rows (``_StridedShard`` on an uneven size). Here the runs themselves are
cut, and anything but one box is refused.

FSDP over tensor parallelism is the exception. ``fully_shard`` cuts what tensor parallelism left, and writes
that down as a strided shard; on sizes that do not divide (13 rows over 3 x 2 ranks) a strided shard means
other rows than it cut. Memory holds what was cut, so that is what counts here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.tensor.placement_types import Placement

_Runs = list[tuple[int, int]]
_Axis = tuple[int, int, int]  # number of ranks, this rank's index, split factor


class NotOneBoxError(ValueError):
    """The rank's elements are no single box. Raised to the exporter, which knows tensor and rank."""


def held_region(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Region:
    """The region that one mesh coordinate holds; it may be empty.

    Args:
        shape: the tensor's GLOBAL shape, in elements.
        mesh_shape: number of ranks along each mesh axis.
        coordinate: of the rank, one index a mesh axis.
        placements: one a mesh axis, applied from left to right as DTensor does; on a dim that ``fully_shard``
            cut after tensor parallelism, from right to left.

    Raises:
        NotOneBoxError: the elements are separate runs, or a placement is neither a shard nor a replica.
    """
    runs: list[_Runs] = [[(0, size)] for size in shape]
    for dim, axes in _axes_by_dim(mesh_shape, coordinate, placements).items():
        for axis in axes:
            runs[dim] = _cut(runs[dim], *axis)
    if not all(runs):
        return Region(tuple(shape), tuple(shape))
    boxes = [_only_run(held, size) for held, size in zip(runs, shape, strict=True)]
    return Region(tuple(start for start, _ in boxes), tuple(stop for _, stop in boxes))


def _axes_by_dim(
    mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> dict[int, list[_Axis]]:
    """The mesh axes that cut each dim, in the order in which they did."""
    by_dim: dict[int, list[_Axis]] = {}
    for num_ranks, index, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise NotOneBoxError(f"placement {placement} is neither a shard nor a replica")
        by_dim.setdefault(dim, []).append((num_ranks, index, int(getattr(placement, "split_factor", 1))))
    return {dim: _innermost_first(axes) if _is_fsdp_over_tp(axes) else axes for dim, axes in by_dim.items()}


def _is_fsdp_over_tp(axes: Sequence[_Axis]) -> bool:
    """Whether every strided cut is into as many parts as the cuts right of it make."""
    num_right, is_strided = 1, False
    for num_ranks, _, split_factor in reversed(axes):
        if split_factor != 1:
            if split_factor != num_right:
                return False
            is_strided = True
        num_right *= num_ranks
    return is_strided


def _innermost_first(axes: Sequence[_Axis]) -> list[_Axis]:
    return [(num_ranks, index, 1) for num_ranks, index, _ in reversed(axes)]


def _cut(runs: _Runs, num_ranks: int, index: int, split_factor: int) -> _Runs:
    """What is left of ``runs`` after one shard; a strided shard cuts each of ``split_factor`` parts."""
    length = sum(stop - start for start, stop in runs)
    kept: _Runs = []
    for part in range(split_factor):
        start, stop = _chunk(0, length, split_factor, part)
        kept += _take(runs, *_chunk(start, stop, num_ranks, index))
    return kept


def _chunk(start: int, stop: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Chunk ``index`` of ``[start, stop)`` as ``torch.chunk`` cuts it, empty ones at the end included."""
    size = -(-(stop - start) // num_chunks)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)


def _take(runs: _Runs, start: int, stop: int) -> _Runs:
    """Elements ``[start, stop)`` of the sequence that ``runs`` lay end to end."""
    taken: _Runs = []
    passed = 0
    for first, last in runs:
        low, high = max(start - passed, 0), min(stop - passed, last - first)
        if low < high:
            taken.append((first + low, first + high))
        passed += last - first
    return taken


def _only_run(runs: _Runs, size: int) -> tuple[int, int]:
    for (_, stop), (start, _) in pairwise(runs):
        if stop != start:
            raise NotOneBoxError(f"the rank holds separate runs of rows {runs} of {size}")
    return runs[0][0], runs[-1][1]
