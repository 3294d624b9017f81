"""Random worlds: tensors, who holds which region of them, and how each rank lays it out in memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field

from hypothesis import strategies as st

from rdt_core.dtypes import ITEMSIZE_BYTES
from rdt_core.layout import span_nbytes
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.placement import Placement, Replicate, ShardDim, local_region
from rdt_core.read_method import LinkPrice, ReadCost
from rdt_core.region import Region

ROWS = LinkPrice(bytes_per_s=1e9, per_read_s=2e-9, takes_rows=True)

COSTS = (
    ReadCost(arenas="never"),
    ReadCost(per_read_s=0.0, arenas="never"),
    ReadCost(per_read_s=1.0, max_over_read=1e9, arenas="never"),
    ReadCost(per_read_s=2e-9, bytes_per_s=1e9, max_over_read=1e9, arenas="never"),
    ReadCost(per_read_s=1.0, max_over_read=2.0, arenas="never"),
    ReadCost(),
    ReadCost(per_read_s=0.0),
    ReadCost(per_read_s=2e-9, bytes_per_s=1e9, max_over_read=1e9),
    ReadCost(by_trainer=dict.fromkeys(range(6), ROWS)),
    ReadCost(by_trainer={0: ROWS, 2: ROWS}, arenas="never"),
)


@dataclass
class World:
    """A trainer side and an engine side of the same tensors, and which tensor names share their values."""

    tensors: dict[str, TensorSpec]
    trainers: list[Manifest]
    engines: list[Manifest]
    tied: dict[str, str]


@dataclass
class Memory:
    """Windows and shards of one rank while they are being laid out."""

    windows: dict[str, int] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)


def regions_within(shape: tuple[int, ...]) -> st.SearchStrategy[Region]:
    """Any region of a tensor, empty ones included."""
    bounds = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*bounds).map(
        lambda pairs: Region(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
    )


@st.composite
def splits(draw: st.DrawFn, region: Region, most: int = 5) -> list[Region]:
    """Disjoint regions that cover ``region``, by straight cuts; some may be empty."""
    parts = [region]
    for _ in range(draw(st.integers(0, most - 1))):
        if not region.start:
            break
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(region.start) - 1))
        at = draw(st.integers(part.start[dim], part.stop[dim]))
        parts.append(Region(part.start, (*part.stop[:dim], at, *part.stop[dim + 1 :])))
        parts.append(Region((*part.start[:dim], at, *part.start[dim + 1 :]), part.stop))
    return parts


@st.composite
def holdings(draw: st.DrawFn, shape: tuple[int, ...], num_ranks: int) -> list[tuple[int, Region]]:
    """(rank, region) pairs that cover a tensor: a mesh's placements, or any cuts with any replicas."""
    whole = Region.whole(shape)
    if draw(st.booleans()):
        meshes = [mesh for mesh in itertools.product((1, 2, 3), repeat=2) if math.prod(mesh) <= num_ranks]
        mesh = draw(st.sampled_from(meshes))
        choices: list[Placement] = [Replicate(), *(ShardDim(dim) for dim in range(len(shape)))]
        placements = [draw(st.sampled_from(choices)) for _ in mesh]
        coordinates = itertools.product(*(range(n) for n in mesh))
        return [(rank, local_region(shape, mesh, at, placements)) for rank, at in enumerate(coordinates)]
    pairs: list[tuple[int, Region]] = []
    for part in draw(splits(whole)):
        ranks = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=num_ranks))
        pairs.extend((rank, part) for rank in sorted(ranks))
    return pairs


@st.composite
def lay_out(draw: st.DrawFn, memory: Memory, spec: TensorSpec, region: Region, whole: bool) -> None:
    """Put a region into a window of its own or behind others, padded and permuted, as one or more shards."""
    itemsize = ITEMSIZE_BYTES[spec.dtype]
    strides, step = [0] * len(region.start), itemsize
    for dim in draw(st.permutations(range(len(region.start)))):
        strides[dim] = step
        step *= max(region.shape[dim], 1) + draw(st.sampled_from((0, 0, 0, 1, 3)))
    window = f"window{draw(st.integers(0, 2))}"
    base = memory.windows.get(window, 0) + itemsize * draw(st.sampled_from((0, 0, 1, 5)))
    base += -base % itemsize
    memory.windows[window] = base + span_nbytes(region.shape, strides, itemsize)
    for part in [region] if whole else draw(splits(region, 3)):
        offset = sum((a - b) * c for a, b, c in zip(part.start, region.start, strides, strict=True))
        memory.shards.append(
            Shard(
                tensor=spec.name,
                region=part,
                window=window,
                offset_bytes=base + (offset if part.num_elements else 0),
                stride_bytes=tuple(strides),
                dtype=spec.dtype,
            )
        )


def finish(
    side: str, memories: list[Memory], tensors: dict[str, TensorSpec], tail: int = 0
) -> list[Manifest]:
    """Manifests of the laid-out ranks, two to a node; windows end ``tail`` bytes behind the last element."""
    return [
        Manifest(
            side=side,
            rank=rank,
            world_size=len(memories),
            node=f"node{rank // 2}",
            device="cpu",
            transports=("memory", "nixl", "yr")[rank % 4 :],
            windows={name: Window(name, nbytes + tail) for name, nbytes in memory.windows.items()},
            tensors=dict(tensors),
            shards=tuple(memory.shards),
        )
        for rank, memory in enumerate(memories)
    ]


specs_shapes = st.lists(st.integers(0, 6) | st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Two sides of one to three tensors, of which the last may share the first one's memory."""
    tensors, tied = {}, {}
    for index in range(draw(st.integers(1, 3))):
        name = f"layers.{index}.weight"
        dtype = draw(st.sampled_from(("uint8", "bfloat16", "float32")))
        tensors[name] = TensorSpec(name, draw(specs_shapes), dtype)
        tied[name] = name
    trainers = [Memory() for _ in range(draw(st.integers(1, 6)))]
    for spec in tensors.values():
        _hold_in_trainers(draw, trainers, spec)
    if draw(st.booleans()):
        _tie(trainers, tensors, tied)
    engines = [Memory() for _ in range(draw(st.integers(1, 4)))]
    for spec in tensors.values():
        # Twice, when an engine loads one tensor into two parameters.
        for _ in range(draw(st.sampled_from((1, 1, 2)))):
            for rank, region in draw(holdings(spec.shape, len(engines))):
                draw(lay_out(engines[rank], spec, region, whole=False))
    tail = draw(st.sampled_from((0, 7)))
    return World(
        tensors, finish("trainer", trainers, tensors), finish("engine", engines, tensors, tail), tied
    )


def _hold_in_trainers(draw: st.DrawFn, trainers: list[Memory], spec: TensorSpec) -> None:
    """Every rank's part of one tensor; all replicas describe it by equal regions, in their own memory."""
    cuts: dict[Region, list[Region]] = {}
    for rank, region in draw(holdings(spec.shape, len(trainers))):
        if region not in cuts:
            cuts[region] = draw(splits(region, 3))
        memory = Memory()
        memory.windows = trainers[rank].windows
        draw(lay_out(memory, spec, region, whole=True))
        (whole,) = memory.shards
        trainers[rank].shards.extend(_sub_shard(whole, part) for part in cuts[region])


def _sub_shard(shard: Shard, part: Region) -> Shard:
    steps = zip(part.start, shard.region.start, shard.stride_bytes, strict=True)
    offset = sum((a - b) * stride for a, b, stride in steps) if part.num_elements else 0
    return dataclasses.replace(shard, region=part, offset_bytes=shard.offset_bytes + offset)


def _tie(trainers: list[Memory], tensors: dict[str, TensorSpec], tied: dict[str, str]) -> None:
    """Add a tensor that lives in the first one's memory, as a tied ``lm_head.weight`` does."""
    first = next(iter(tensors.values()))
    tensors["lm_head.weight"] = dataclasses.replace(first, name="lm_head.weight")
    tied["lm_head.weight"] = first.name
    for memory in trainers:
        memory.shards.extend(
            dataclasses.replace(shard, tensor="lm_head.weight")
            for shard in list(memory.shards)
            if shard.tensor == first.name
        )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A valid manifest of either side, of a few tensors of which the rank holds or needs any parts."""
    tensors: dict[str, TensorSpec] = {}
    memory = Memory()
    for index in range(draw(st.integers(0, 3))):
        name = f"layers.{index}.weight"
        dtype = draw(st.sampled_from(("uint8", "bfloat16", "float32")))
        tensors[name] = spec = TensorSpec(name, draw(specs_shapes), dtype)
        draw(lay_out(memory, spec, draw(regions_within(spec.shape)), whole=False))
    (manifest,) = finish(draw(st.sampled_from(("trainer", "engine"))), [memory], tensors)
    return manifest
