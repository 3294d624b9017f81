"""How a box of elements lies in memory: strides, spans, and the contiguous blocks that hold it.

Every function takes the box's ``shape`` in elements and its ``stride_bytes``, one a dim and never
negative. Both sides of a read and the simulator use these functions, so that they cannot disagree.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.manifest import Shard
    from rdt_core.region import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One way to hold a strided box in byte blocks of one size.

    Args:
        block_nbytes: bytes of every block, gaps inside it included.
        outer_dims: dims that are walked from block to block, the widest stride first; each block holds all
            the others. Empty when one block, the span, holds the whole box.
        num_blocks: how many blocks there are.
    """

    block_nbytes: int
    outer_dims: tuple[int, ...]
    num_blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks together."""
        return self.block_nbytes * self.num_blocks


def row_major_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a contiguous tensor of ``shape``, the last dim fastest."""
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def span_nbytes(shape: Sequence[int], stride_bytes: Sequence[int], itemsize: int) -> int:
    """Bytes from the first to behind the last element; 0 for an empty box."""
    if 0 in shape:
        return 0
    return itemsize + sum([(n - 1) * stride for n, stride in zip(shape, stride_bytes, strict=True)])


def offset_of(shard: Shard, region: Region) -> int:
    """Byte offset in the shard's window of the first element of ``region``, which the shard contains."""
    if region.start == shard.region.start:
        return shard.offset_bytes
    steps = map(operator.sub, region.start, shard.region.start)
    distance: int = sum(map(operator.mul, steps, shard.stride_bytes))
    return shard.offset_bytes + distance


def is_contiguous(shape: Sequence[int], stride_bytes: Sequence[int], itemsize: int) -> bool:
    """Whether the elements fill their span without gap or overlap, in whatever order of dims."""
    if 0 in shape:
        return True
    repeats = any(n > 1 and stride == 0 for n, stride in zip(shape, stride_bytes, strict=True))
    return not repeats and not _dims_between(shape, stride_bytes, itemsize)[1]


def find_cuts(shape: Sequence[int], stride_bytes: Sequence[int], itemsize: int) -> list[Cut]:
    """Every way to cut a box that is not empty into disjoint blocks of one size, the finest first.

    The finest is the contiguous runs, the last is always the one enclosing span. A contiguous box has
    just one cut. Dims whose strides overlap each other are never walked, only spanned.
    """
    run_nbytes, dims = _dims_between(shape, stride_bytes, itemsize)
    if not dims:
        return [Cut(block_nbytes=run_nbytes, outer_dims=(), num_blocks=1)]
    num_walkable = _count_walkable(run_nbytes, dims, shape, stride_bytes)
    cuts = []
    block_nbytes = run_nbytes
    for inner in range(len(dims) + 1):
        if inner > 0:
            block_nbytes += (shape[dims[inner - 1]] - 1) * stride_bytes[dims[inner - 1]]
        if len(dims) - inner <= num_walkable:
            outer = tuple(reversed(dims[inner:]))
            num_blocks = 1
            for dim in outer:
                num_blocks *= shape[dim]
            cuts.append(Cut(block_nbytes=block_nbytes, outer_dims=outer, num_blocks=num_blocks))
    return cuts


def block_steps(cut: Cut, shape: Sequence[int], steps: Sequence[int]) -> Iterator[int]:
    """Distance of every block of ``cut`` from the first, with ``steps[i]`` bytes along ``outer_dims[i]``.

    With the source's strides as steps the distances ascend; with a landing buffer's they name the same
    blocks in the same order.
    """
    ranges = [range(0, shape[dim] * step, step) for dim, step in zip(cut.outer_dims, steps, strict=True)]
    return map(sum, itertools.product(*ranges))


def _dims_between(shape: Sequence[int], stride_bytes: Sequence[int], itemsize: int) -> tuple[int, list[int]]:
    """Bytes of a contiguous run, and the dims that lead from run to run, the narrowest stride first."""
    dims = [dim for dim, n in enumerate(shape) if n > 1 and stride_bytes[dim] > 0]
    dims.sort(key=stride_bytes.__getitem__)
    run_nbytes = itemsize
    for joined, dim in enumerate(dims):
        if stride_bytes[dim] != run_nbytes:
            return run_nbytes, dims[joined:]
        run_nbytes *= shape[dim]
    return run_nbytes, []


def _count_walkable(run: int, dims: Sequence[int], shape: Sequence[int], stride_bytes: Sequence[int]) -> int:
    """How many of the widest dims step over all that lies inside of them."""
    walkable, span = 0, run
    for dim in dims:
        walkable = walkable + 1 if stride_bytes[dim] >= span else 0
        span += (shape[dim] - 1) * stride_bytes[dim]
    return walkable
