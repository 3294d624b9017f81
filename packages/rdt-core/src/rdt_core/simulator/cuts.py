"""What reading one need costs: bytes that cross the link, reads, and copies that its trainer rank makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import find_cuts

if TYPE_CHECKING:
    from rdt_core.simulator.classes import Need


@dataclass(frozen=True, slots=True)
class LandedPiece:
    """One tensor's part of a need, as it is read.

    Args:
        read_nbytes: that cross the link.
        num_reads: one-sided reads.
        target_nbytes: in the engine's parameters.
        arena_nbytes: that the trainer rank reads and writes at publish to lay it out; 0 when it is read as
            it lies.
    """

    read_nbytes: int
    num_reads: int
    target_nbytes: int
    arena_nbytes: int


def land(need: Need) -> LandedPiece:
    """As it lies where that is contiguous and no wider than the engine's; else laid out in an arena."""
    shard, elements = need.shard, need.region.num_elements
    source, target = itemsize_bytes(shard.dtype), itemsize_bytes(need.target_dtype)
    if target >= source and len(find_cuts(need.region.shape, shard.stride_bytes, source)) == 1:
        return LandedPiece(elements * source, 1, elements * target, 0)
    laid = elements * min(source, target)
    return LandedPiece(laid, 1, elements * target, elements * source + laid)
