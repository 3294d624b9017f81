"""Intersects what an engine rank needs with what the trainer ranks hold, and makes the plan of reads.

Pure and deterministic: one engine manifest and one set of trainer manifests give one plan, in whatever
order the trainers come.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from rdt_core.coverage import find_uncovered
from rdt_core.dtypes import is_convertible, itemsize_bytes
from rdt_core.errors import CoverageError, DtypeError, ShapeError, UnknownTensorError
from rdt_core.layout import offset_of
from rdt_core.lowering import lower_pieces
from rdt_core.read_method import Piece, ReadCost
from rdt_core.region import Region
from rdt_core.sources import Holder, SourceIndex, TensorHoldings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.manifest import Manifest, Shard
    from rdt_core.plan import Plan

__all__ = ["ReadCost", "build_plan", "build_plan_from"]


def build_plan(engine: Manifest, trainers: Sequence[Manifest], *, cost: ReadCost | None = None) -> Plan:
    """The plan of one engine rank. Called once at connect, by the subscriber; takes seconds at most.

    Every element of every engine shard is copied from exactly one trainer rank, and no byte of a trainer
    rank's own memory is read twice.

    Args:
        engine: what the engine rank wants filled.
        trainers: one manifest a trainer rank, in any order.
        cost: prices that decide how each piece is read.

    Raises:
        UnknownTensorError: no trainer rank knows a tensor that the engine needs.
        ShapeError: two manifests give a tensor different global shapes, or a region outside of it.
        OverlapError: two trainer regions are neither equal nor disjoint.
        DtypeError: no replica of a region has a dtype that converts to the engine's.
        CoverageError: a part of a needed region is held by no trainer rank.
        PlanError: two manifests claim one trainer rank.
    """
    return build_plan_from(engine, SourceIndex(trainers), cost=cost)


def build_plan_from(engine: Manifest, sources: SourceIndex, *, cost: ReadCost | None = None) -> Plan:
    """Like :func:`build_plan`, for callers who plan many engine ranks against one set of trainers."""
    chooser = _Chooser(engine, sources.nodes)
    pieces: list[Piece] = []
    for shard in engine.shards:
        pieces.extend(_find_pieces(engine, shard, sources, chooser))
    return lower_pieces(engine.rank, pieces, cost or ReadCost())


def _find_pieces(engine: Manifest, target: Shard, sources: SourceIndex, chooser: _Chooser) -> list[Piece]:
    """One piece a trainer region that meets the engine's shard."""
    holdings = _find_holdings(engine, target, sources)
    pieces = []
    left = target.region.num_elements
    for region, holders in holdings.meeting(target.region):
        usable = [holder for holder in holders if is_convertible(holder.shard.dtype, target.dtype)]
        if not usable:
            found = holders[0]
            raise DtypeError(target.tensor, str(region), found.shard.dtype, target.dtype, found.trainer_rank)
        holder = chooser.choose(usable)
        piece = Piece(
            trainer_rank=holder.trainer_rank,
            source=holder.shard,
            target=target,
            region=region,
            nbytes=region.num_elements * itemsize_bytes(holder.shard.dtype),
            source_offset_bytes=offset_of(holder.shard, region),
            source_device=sources.devices[holder.trainer_rank],
            target_device=engine.device,
        )
        chooser.add_load(piece)
        pieces.append(piece)
        left -= region.num_elements
    # The regions of `holdings` are disjoint, so that sizes that add up prove coverage.
    if left:
        missing = find_uncovered(target.region, [piece.region for piece in pieces])
        raise CoverageError(target.tensor, str(missing), engine.rank)
    return pieces


def _find_holdings(engine: Manifest, target: Shard, sources: SourceIndex) -> TensorHoldings:
    holdings = sources.find(target.tensor)
    if holdings is None:
        raise UnknownTensorError(target.tensor, engine.rank)
    spec = engine.tensors.get(target.tensor)
    if spec is not None and spec.shape != holdings.shape:
        raise ShapeError(target.tensor, engine.rank, str(spec.shape), str(holdings.shape))
    region = target.region
    if len(region.start) != len(holdings.shape) or not Region.whole(holdings.shape).contains(region):
        raise ShapeError(target.tensor, engine.rank, f"needed as {region}", f"a region of {holdings.shape}")
    return holdings


class _Chooser:
    """Picks one replica of every trainer region: on the engine's node if there is one, else the least loaded.

    The same memory is always read from the same rank, so that what two engine shards share (tied copies,
    fused duplicates) crosses the link once. Ties start at another replica for every engine rank and node.
    """

    def __init__(self, engine: Manifest, nodes: dict[int, str]) -> None:
        self._near = {rank for rank, node in nodes.items() if node == engine.node}
        self._turn = engine.rank + zlib.crc32(engine.node.encode("utf-8", "replace"))
        self._load = dict.fromkeys(nodes, 0)
        self._chosen: dict[tuple[int, str, int], int] = {}

    def choose(self, holders: Sequence[Holder]) -> Holder:
        if len(holders) == 1:
            return holders[0]
        first = holders[0]
        memory = (first.trainer_rank, first.shard.window, first.shard.offset_bytes)
        rank = self._chosen.get(memory)
        for holder in holders:
            if holder.trainer_rank == rank:
                return holder
        chosen = self._choose_least_loaded(holders)
        self._chosen[memory] = chosen.trainer_rank
        return chosen

    def add_load(self, piece: Piece) -> None:
        self._load[piece.trainer_rank] += piece.nbytes

    def _choose_least_loaded(self, holders: Sequence[Holder]) -> Holder:
        near = [holder for holder in holders if holder.trainer_rank in self._near] or holders
        start = self._turn % len(near)
        turned = [*near[start:], *near[:start]]
        return min(turned, key=lambda holder: self._load[holder.trainer_rank])
