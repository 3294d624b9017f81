"""What reading one need costs: bytes that cross the link, reads, and copies that its trainer rank makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import offset_of
from rdt_core.read_method import Piece, ReadCost, choose_methods

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
    """As the planner would read it at its own prices, were there no other piece."""
    shard, elements = need.shard, need.region.num_elements
    source, target = itemsize_bytes(shard.dtype), itemsize_bytes(need.target_dtype)
    piece = Piece(
        trainer_rank=need.holders[0],
        source=shard,
        target=replace(shard, region=need.region, dtype=need.target_dtype),
        region=need.region,
        nbytes=elements * source,
        source_offset_bytes=offset_of(shard, need.region),
        source_device="cuda",
        target_device="cuda",
    )
    (method,) = choose_methods([piece], ReadCost())
    if method.cut is not None:
        return LandedPiece(method.cut.nbytes, method.cut.num_blocks, elements * target, 0)
    laid = elements * itemsize_bytes(method.dtype)
    return LandedPiece(laid, 1, elements * target, elements * source + laid)
