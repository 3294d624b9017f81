"""Intersects what an engine rank needs with what the trainer ranks hold, and makes the plan of reads.

Pure and deterministic: one engine manifest and one set of trainer manifests give one plan, in whatever
order the trainers come.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.collection import paused_collection
from rdt_core.coverage import find_uncovered
from rdt_core.dtypes import is_convertible, itemsize_bytes
from rdt_core.errors import CoverageError, DtypeError, ShapeError, UnknownTensorError
from rdt_core.layout import offset_of
from rdt_core.lowering import lower_pieces
from rdt_core.read_method import Piece, ReadCost
from rdt_core.replicas import Option, Reader, choose_replicas
from rdt_core.sources import SourceIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.manifest import Manifest, Shard
    from rdt_core.plan import Plan
    from rdt_core.region import Region
    from rdt_core.sources import Holder, TensorHoldings

__all__ = ["ReadCost", "build_plan", "build_plan_from"]


def build_plan(engine: Manifest, trainers: Sequence[Manifest], *, cost: ReadCost | None = None) -> Plan:
    """The plan of one engine rank. Called once at connect, by the subscriber; takes seconds at most.

    Every element of every engine shard is copied from exactly one trainer rank, and no byte of a trainer
    rank's own memory is read twice, except where two pieces are read as rows of boxes that overlap.

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


@paused_collection()
def build_plan_from(engine: Manifest, sources: SourceIndex, *, cost: ReadCost | None = None) -> Plan:
    """Like :func:`build_plan`, for callers who plan many engine ranks against one set of trainers."""
    needs = [need for shard in engine.shards for need in _find_needs(engine, shard, sources)]
    options = [Option(need.holders, _nbytes_of(need.region, need.holders[0])) for need in needs]
    reader = Reader(node=engine.node, rank=engine.rank, world_size=engine.world_size)
    chosen = choose_replicas(options, sources.nodes, reader)
    pieces = [
        Piece(
            trainer_rank=holder.trainer_rank,
            source=holder.shard,
            target=need.target,
            region=need.region,
            nbytes=_nbytes_of(need.region, holder),
            source_offset_bytes=offset_of(holder.shard, need.region),
            source_device=sources.devices[holder.trainer_rank],
            target_device=engine.device,
        )
        for need, holder in zip(needs, chosen, strict=True)
    ]
    return lower_pieces(engine.rank, pieces, cost or ReadCost())


@dataclass(frozen=True, slots=True)
class _Need:
    """A trainer region that meets an engine's shard, and the replicas whose dtype converts."""

    target: Shard
    region: Region
    holders: list[Holder]


def _find_needs(engine: Manifest, target: Shard, sources: SourceIndex) -> list[_Need]:
    """One need a trainer region that meets the engine's shard."""
    holdings = _find_holdings(engine, target, sources)
    needs = []
    left = target.region.num_elements
    for region, holders in holdings.meeting(target.region):
        usable = [holder for holder in holders if is_convertible(holder.shard.dtype, target.dtype)]
        if not usable:
            found = holders[0]
            raise DtypeError(target.tensor, str(region), found.shard.dtype, target.dtype, found.trainer_rank)
        needs.append(_Need(target, region, usable))
        left -= region.num_elements
    # The regions of `holdings` are disjoint, so that sizes that add up prove coverage.
    if left:
        missing = find_uncovered(target.region, [need.region for need in needs])
        raise CoverageError(target.tensor, str(missing), engine.rank, sources.ranks_without(target.tensor))
    return needs


def _nbytes_of(region: Region, holder: Holder) -> int:
    return region.num_elements * itemsize_bytes(holder.shard.dtype)


def _find_holdings(engine: Manifest, target: Shard, sources: SourceIndex) -> TensorHoldings:
    holdings = sources.find(target.tensor)
    if holdings is None:
        raise UnknownTensorError(target.tensor, engine.rank)
    spec = engine.tensors.get(target.tensor)
    if spec is not None and spec.shape != holdings.shape:
        raise ShapeError(target.tensor, engine.rank, str(spec.shape), str(holdings.shape))
    region = target.region
    if len(region.start) != len(holdings.shape) or any(map(operator.gt, region.stop, holdings.shape)):
        raise ShapeError(target.tensor, engine.rank, f"needed as {region}", f"a region of {holdings.shape}")
    return holdings
