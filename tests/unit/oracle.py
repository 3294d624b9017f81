"""Carries plans out over plain bytes, element by element, and says what must come of it. Slow and obvious."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from rdt_core.arena import ARENA_WINDOW
from rdt_core.dtypes import ITEMSIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.arena import ArenaItem
    from rdt_core.manifest import Manifest, Shard
    from rdt_core.plan import Copy, Plan
    from rdt_core.region import Region
    from rdt_core.row_blocks import Rows
    from tests.unit.strategies import World

UNTOUCHED = 0xEE


def coordinates(region: Region) -> Iterator[tuple[int, ...]]:
    """Every element of a region."""
    return itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True)))


def element_value(world: World, tensor: str, at: tuple[int, ...]) -> bytes:
    """The bytes of one element, another for every element of the world as far as its size allows."""
    name = world.tied[tensor]
    number = 1 + 1009 * list(world.tensors).index(name)
    for index, n in zip(at, world.tensors[name].shape, strict=True):
        number = number * (n + 1) + index
    itemsize = ITEMSIZE_BYTES[world.tensors[name].dtype]
    return (number % (1 << 8 * itemsize)).to_bytes(itemsize, "little")


def element_offset(shard: Shard, at: tuple[int, ...]) -> int:
    """Where the shard's window holds one element."""
    steps = zip(at, shard.region.start, shard.stride_bytes, strict=True)
    return shard.offset_bytes + sum((index - first) * stride for index, first, stride in steps)


def fill_windows(world: World, manifest: Manifest) -> dict[str, bytearray]:
    """The rank's windows with every shard's values in place and every other byte untouched."""
    windows = {name: bytearray([UNTOUCHED]) * window.nbytes for name, window in manifest.windows.items()}
    for shard in manifest.shards:
        for at in coordinates(shard.region):
            offset, value = element_offset(shard, at), element_value(world, shard.tensor, at)
            windows[shard.window][offset : offset + len(value)] = value
    return windows


def run_reads(
    plan: Plan, trainers: Sequence[Manifest], windows: dict[int, dict[str, bytearray]]
) -> bytearray:
    """The landing buffer after all reads, each checked to stay inside of its window and the buffer."""
    landing = bytearray([0xAA]) * plan.landing_nbytes
    sizes = {(m.rank, window.name): window.nbytes for m in trainers for window in m.windows.values()}
    windows = with_arenas(plan, windows)
    sizes |= {(rank, ARENA_WINDOW): len(windows[rank][ARENA_WINDOW]) for rank in plan.arenas}
    written: Counter[int] = Counter()
    for rank, reads in plan.reads.items():
        for read in reads:
            assert read.trainer_rank == rank
            assert read.nbytes > 0
            source, target = offsets_of(read.source), offsets_of(read.target)
            assert target == list(range(read.landing_offset_bytes, read.landing_offset_bytes + read.nbytes))
            assert 0 <= min(source) <= max(source) < sizes[rank, read.window]
            assert 0 <= min(target) <= max(target) < plan.landing_nbytes
            for at, into in zip(source, target, strict=True):
                landing[into] = windows[rank][read.window][at]
            written.update(target)
    assert not written or max(written.values()) == 1, "two reads land on one byte"
    return landing


def offsets_of(rows: Rows) -> list[int]:
    """Every byte of the rows, in order."""
    return [
        rows.offset + row * rows.pitch + byte
        for row in range(rows.num_rows)
        for byte in range(rows.row_nbytes)
    ]


def with_arenas(plan: Plan, windows: dict[int, dict[str, bytearray]]) -> dict[int, dict[str, bytearray]]:
    """Every trainer rank's windows, and the arena that it lays out for the plan as one more."""
    found = {rank: dict(held) for rank, held in windows.items()}
    for rank, items in plan.arenas.items():
        found[rank][ARENA_WINDOW] = make_arena(items, found[rank])
    return found


def make_arena(items: Sequence[ArenaItem], windows: dict[str, bytearray]) -> bytearray:
    """A trainer rank's arena, packed element by element. The worlds of these tests need no conversion."""
    memory = bytearray()
    for item in items:
        assert item.dtype == item.source_dtype
        memory += bytearray([0xBB]) * (-len(memory) % 16)
        for at in itertools.product(*map(range, item.shape)):
            offset = item.offset_bytes + sum(i * s for i, s in zip(at, item.stride_bytes, strict=True))
            memory += windows[item.window][offset : offset + ITEMSIZE_BYTES[item.dtype]]
    return memory


def run_copies(plan: Plan, engine: Manifest, landing: bytearray) -> dict[str, bytearray]:
    """The engine's windows after all copies, each byte checked to be written at most once."""
    windows = {name: bytearray([UNTOUCHED]) * window.nbytes for name, window in engine.windows.items()}
    written: Counter[tuple[str, int]] = Counter()
    for copy in plan.copies:
        itemsize = ITEMSIZE_BYTES[copy.source_dtype]
        assert copy.landing_offset_bytes % itemsize == 0, "a landed element is not aligned"
        for source, target in zip(landing_offsets(copy), target_offsets(copy), strict=True):
            value = landing[source : source + itemsize]
            assert len(value) == itemsize
            windows[copy.window][target : target + itemsize] = value
            written.update((copy.window, target + byte) for byte in range(itemsize))
    assert not written or max(written.values()) == 1, "two copies write one byte"
    return windows


def landing_offsets(copy: Copy) -> Iterator[int]:
    """Where every element of a copy lies in the landing buffer."""
    for at in coordinates(copy.region):
        steps = zip(at, copy.region.start, copy.landing_stride_bytes, strict=True)
        yield copy.landing_offset_bytes + sum((index - first) * step for index, first, step in steps)


def target_offsets(copy: Copy) -> Iterator[int]:
    """Where every element of a copy lies in its engine window."""
    for at in coordinates(copy.region):
        steps = zip(at, copy.region.start, copy.target_stride_bytes, strict=True)
        yield copy.target_offset_bytes + sum((index - first) * step for index, first, step in steps)


def count_used_landing_bytes(plan: Plan) -> int:
    """Distinct landing bytes that some copy takes."""
    used: set[int] = set()
    for copy in plan.copies:
        for offset in landing_offsets(copy):
            used.update(range(offset, offset + ITEMSIZE_BYTES[copy.source_dtype]))
    return len(used)
