"""Tensors that all ranks hold alike, as one: what makes planning a model of 70,000 tensors quick.

Two tensors are of one class when they have one shape and dtype, the same trainer ranks hold the same regions
of them, and the same engine ranks need the same regions. Whatever is true of one is true of all: a class is
planned once and counted as often as it has tensors. Nothing here knows of models: classes are found by
comparing what the ranks describe.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.errors import CoverageError, UnknownTensorError
from rdt_core.layout import row_major_strides
from rdt_core.manifest import Shard, TensorSpec
from rdt_core.sources import Holder, TensorHoldings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.models.parameter import Layout
    from rdt_core.region import Region

_Held = tuple[int, str]  # id of a region, dtype in memory


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors that all ranks hold alike.

    Args:
        example: one of them.
        num_tensors: how many there are.
        held: by trainer rank, ascending.
        needed: by engine rank, ascending; a rank that needs several regions appears several times.
    """

    example: TensorSpec
    num_tensors: int
    held: tuple[tuple[int, Region, str], ...]
    needed: tuple[tuple[int, Region, str], ...]


@dataclass(frozen=True, slots=True)
class Need:
    """A box that engine ranks need of every tensor of a class, and the trainer ranks that hold it.

    Args:
        region: of each tensor; lies in one trainer region.
        num_tensors: tensors of the class.
        shard: the first holder's.
        target_dtype: in the engine.
        holders: trainer ranks.
        needers: engine ranks.
    """

    region: Region
    num_tensors: int
    shard: Shard
    target_dtype: str
    holders: tuple[int, ...]
    needers: tuple[int, ...]


class _Descriptions:
    """One side's regions by tensor, each region kept once."""

    def __init__(self, layout: Layout) -> None:
        self._ids: dict[tuple[Region, str], int] = {}
        self.regions: list[tuple[Region, str]] = []
        self.by_tensor: defaultdict[str, list[int]] = defaultdict(list)
        self.specs: dict[str, TensorSpec] = {}
        self._stride = layout.world_size
        for rank in range(layout.world_size):
            for parameter in layout.parameters(rank):
                last: tuple[Region | None, str, int] = (None, "", 0)
                for spec, region in parameter.parts:
                    dtype = parameter.dtype or spec.dtype
                    if last[0] is not region or last[1] != dtype:
                        last = (region, dtype, self._id_of(region, dtype))
                    if last[2] >= 0:
                        self.by_tensor[spec.name].append(last[2] * self._stride + rank)
                        self.specs[spec.name] = spec

    def _id_of(self, region: Region, dtype: str) -> int:
        """A number for the region, -1 for an empty one."""
        if not region.num_elements:
            return -1
        key = (region, dtype)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self.regions)
            self.regions.append(key)
        return found

    def expand(self, codes: tuple[int, ...]) -> tuple[tuple[int, Region, str], ...]:
        """Rank, region and dtype of every code, by rank."""
        rows = ((code % self._stride, *self.regions[code // self._stride]) for code in codes)
        return tuple(sorted(rows, key=lambda row: row[0]))


def find_classes(trainer: Layout, engine: Layout) -> list[TensorClass]:
    """Every class of tensors that the engine needs. Linear in what both sides describe.

    Raises:
        UnknownTensorError: the engine needs a tensor that no trainer rank holds.
    """
    held, needed = _Descriptions(trainer), _Descriptions(engine)
    members: dict[tuple[object, ...], list[str]] = {}
    for name, codes in needed.by_tensor.items():
        if name not in held.by_tensor:
            raise UnknownTensorError(name, codes[0] % engine.world_size)
        spec = needed.specs[name]
        key = (spec.shape, spec.dtype, tuple(held.by_tensor[name]), tuple(codes))
        members.setdefault(key, []).append(name)
    return [
        TensorClass(
            example=needed.specs[names[0]],
            num_tensors=len(names),
            held=held.expand(tuple(held.by_tensor[names[0]])),
            needed=needed.expand(tuple(needed.by_tensor[names[0]])),
        )
        for names in members.values()
    ]


def find_needs(found: TensorClass) -> Iterator[Need]:
    """What engine ranks need of a class, cut where trainer regions end; covers every needed region.

    Raises:
        CoverageError: a part is held by no trainer rank.
        OverlapError, ShapeError: the trainer's regions are not disjoint or not in the tensor.
    """
    spec = found.example
    holdings = TensorHoldings(spec.name, spec.shape, [_holder(spec, *row) for row in found.held])
    needers: dict[tuple[Region, str], list[int]] = {}
    for rank, region, dtype in found.needed:
        needers.setdefault((region, dtype), []).append(rank)
    for (region, dtype), ranks in needers.items():
        left = region.num_elements
        for part, holders in holdings.meeting(region):
            left -= part.num_elements
            yield Need(
                part,
                found.num_tensors,
                holders[0].shard,
                dtype,
                tuple(holder.trainer_rank for holder in holders),
                tuple(ranks),
            )
        if left:
            raise CoverageError(spec.name, str(region), ranks[0])


def _holder(spec: TensorSpec, rank: int, region: Region, dtype: str) -> Holder:
    """A trainer rank's copy; layouts hold every region row-major."""
    strides = row_major_strides(region.shape, itemsize_bytes(dtype))
    shard = Shard(
        tensor=spec.name, region=region, window=spec.name, offset_bytes=0, stride_bytes=strides, dtype=dtype
    )
    return Holder(rank, shard)
