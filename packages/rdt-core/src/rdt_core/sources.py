"""Where the regions of every tensor are held among the trainer ranks, indexed for the planner."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.collection import paused_collection
from rdt_core.coverage import find_overlap, widest_axis
from rdt_core.errors import OverlapError, PlanError, ShapeError
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.manifest import Manifest, Shard


@dataclass(frozen=True, slots=True)
class Holder:
    """One trainer rank's copy of a region."""

    trainer_rank: int
    shard: Shard


class TensorHoldings:
    """The distinct regions of one tensor, disjoint, each with the replicas that hold it.

    Args:
        tensor: its name.
        shape: its global shape in elements.
        shards: every trainer rank's shards of it, by rank.

    Raises:
        ShapeError: a region lies outside of the shape.
        OverlapError: two regions are neither equal nor disjoint.
    """

    def __init__(self, tensor: str, shape: tuple[int, ...], shards: Sequence[Holder]) -> None:
        self.shape = shape
        whole = Region.whole(shape)
        by_region: dict[Region, list[Holder]] = {}
        for holder in shards:
            region = holder.shard.region
            if len(region.start) != len(shape) or not whole.contains(region):
                raise ShapeError(tensor, holder.trainer_rank, f"held as {region}", f"a region of {shape}")
            if region.num_elements:
                by_region.setdefault(region, []).append(holder)
        regions = list(by_region)
        self._axis = axis = widest_axis(regions)
        regions.sort(
            key=lambda region: (0 if axis is None else region.start[axis], region.start, region.stop)
        )
        self._regions = regions
        self._holders = [by_region[region] for region in regions]
        self._starts = [0 if axis is None else region.start[axis] for region in regions]
        stops = [1 if axis is None else region.stop[axis] for region in regions]
        self._reach = list(itertools.accumulate(stops, max))
        self._refuse_overlap(tensor)

    def meeting(self, needed: Region) -> Iterator[tuple[Region, list[Holder]]]:
        """Every part of ``needed`` that some trainer rank holds, with its replicas by rank."""
        axis = self._axis
        low, high = (0, 1) if axis is None else (needed.start[axis], needed.stop[axis])
        for index in range(bisect_right(self._reach, low), bisect_left(self._starts, high)):
            part = needed.intersect(self._regions[index])
            if part is not None:
                yield part, self._holders[index]

    def _refuse_overlap(self, tensor: str) -> None:
        if all(map(operator.le, self._reach, self._starts[1:])):
            return  # each begins where those before it have ended
        found = find_overlap(self._regions)
        if found is not None:
            first, second = sorted(found)
            raise OverlapError(
                tensor,
                str(self._regions[first]),
                self._holders[first][0].trainer_rank,
                str(self._regions[second]),
                self._holders[second][0].trainer_rank,
            )


class SourceIndex:
    """All trainer ranks' manifests, looked up by tensor.

    Pure and reusable: make one for a set of trainers and plan any number of engine ranks with it. A
    tensor is checked when it is first looked up, so that a rank pays only for what it needs.

    Args:
        trainers: one manifest a rank, in any order.

    Raises:
        PlanError: two manifests claim one rank.
    """

    @paused_collection()
    def __init__(self, trainers: Sequence[Manifest]) -> None:
        self._trainers = sorted(trainers, key=lambda manifest: manifest.rank)
        for one, other in itertools.pairwise(self._trainers):
            if one.rank == other.rank:
                raise PlanError(
                    f"two manifests claim trainer rank {one.rank}, expected one a rank. Attach every rank "
                    "under its own global rank."
                )
        self.nodes = {manifest.rank: manifest.node for manifest in self._trainers}
        self.devices = {manifest.rank: manifest.device for manifest in self._trainers}
        self._shards: dict[str, list[Holder]] = {}
        for manifest in self._trainers:
            for shard in manifest.shards:
                self._shards.setdefault(shard.tensor, []).append(Holder(manifest.rank, shard))
        self._found: dict[str, TensorHoldings | None] = {}

    def find(self, tensor: str) -> TensorHoldings | None:
        """Who holds ``tensor``; None when no trainer rank knows it.

        Raises:
            ShapeError: ranks disagree on its global shape, or hold a region outside of it.
            OverlapError: two of its regions are neither equal nor disjoint.
        """
        if tensor not in self._found:
            shape = self._shape_of(tensor)
            holders = self._shards.get(tensor, [])
            self._found[tensor] = None if shape is None else TensorHoldings(tensor, shape, holders)
        return self._found[tensor]

    def ranks_without(self, tensor: str) -> tuple[int, ...]:
        """Trainer ranks that hold nothing of a tensor."""
        holding = {holder.trainer_rank for holder in self._shards.get(tensor, [])}
        return tuple(manifest.rank for manifest in self._trainers if manifest.rank not in holding)

    def _shape_of(self, tensor: str) -> tuple[int, ...] | None:
        shape = None
        for manifest in self._trainers:
            spec = manifest.tensors.get(tensor)
            if spec is None:
                continue
            if shape is None:
                shape = spec.shape
            elif spec.shape != shape:
                raise ShapeError(tensor, manifest.rank, str(spec.shape), str(shape))
        return shape
