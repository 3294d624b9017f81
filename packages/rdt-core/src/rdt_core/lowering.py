"""Turns pieces, strided boxes of trainer memory, into byte-range reads and landing-to-engine copies.

Transports read contiguous byte ranges only. A piece that is not contiguous is cut into blocks (see
:class:`rdt_core.layout.Cut`): many small exact ones or few large ones with gaps, whichever
:class:`ReadCost` prices lower. All ranges of one trainer window are then united, so that no byte is read
twice.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.coverage import count_union
from rdt_core.dtypes import itemsize_bytes
from rdt_core.errors import ConfigError
from rdt_core.layout import Cut, block_steps, find_cuts, offset_of
from rdt_core.plan import Copy, Plan, Read
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.manifest import Shard

# A landing offset equals its source offset modulo this, so that elements stay aligned and vector loads of
# 16 bytes stay possible where they were possible in the source.
LANDING_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCost:
    """What a read costs, to decide between exact runs and one span over a strided source.

    Args:
        bytes_per_s: throughput of one link.
        per_read_s: what every read costs on top of its bytes, in seconds.
        max_over_read: largest allowed ratio of bytes read to bytes needed; bounds the landing buffer.

    Raises:
        ConfigError: a value is not positive, or ``max_over_read`` is below 1.
    """

    bytes_per_s: float = 5e9
    per_read_s: float = 2e-6
    max_over_read: float = 8.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.per_read_s >= 0 and self.max_over_read >= 1):
            raise ConfigError(
                f"{self} cannot price reads. Use bytes_per_s > 0, per_read_s >= 0 and max_over_read >= 1."
            )

    def price_s(self, cut: Cut) -> float:
        """Seconds that reading all blocks of ``cut`` takes."""
        return cut.num_blocks * self.per_read_s + cut.nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A region that one trainer shard holds and one engine shard needs.

    Args:
        trainer_rank: who holds it.
        source: the trainer's shard.
        target: the engine's shard.
        region: lies in both shards' regions and is not empty.
        nbytes: of its elements in the trainer's memory.
        source_offset_bytes: of its first element in the trainer's window.
    """

    trainer_rank: int
    source: Shard
    target: Shard
    region: Region
    nbytes: int
    source_offset_bytes: int


@dataclass(frozen=True, slots=True)
class _Landed:
    """United byte ranges of one trainer window, ascending, and where each lands."""

    starts: list[int]
    stops: list[int]
    landings: list[int]

    def locate(self, offset: int) -> int:
        """Landing offset of a window byte that is read."""
        index = bisect_right(self.starts, offset) - 1
        return self.landings[index] + offset - self.starts[index]


def lower_pieces(engine_rank: int, pieces: Sequence[Piece], cost: ReadCost) -> Plan:
    """The plan that brings every piece to its engine shard, copies in the order of ``pieces``."""
    chosen = [_choose_cut(piece, cost) for piece in pieces]
    while True:
        landed, landing_nbytes = _assign_landing(pieces, chosen)
        strides = [
            _landing_strides(piece, cut, landed[piece.trainer_rank, piece.source.window])
            for piece, cut in zip(pieces, chosen, strict=True)
        ]
        irregular = [index for index, found in enumerate(strides) if found is None]
        if not irregular:
            break
        # Blocks of other pieces lie between the blocks of these, so that no strides describe where they
        # landed: read them as one span each. Every round spans at least one more, so this ends.
        for index in irregular:
            chosen[index] = _cuts(pieces[index])[-1]
    return Plan(
        engine_rank=engine_rank,
        reads=_make_reads(landed),
        copies=tuple(
            _make_copy(piece, found, landed[piece.trainer_rank, piece.source.window])
            for piece, found in zip(pieces, strides, strict=True)
            if found is not None
        ),
        landing_nbytes=landing_nbytes,
        payload_nbytes=_count_payload(pieces),
        num_tensors=len({piece.target.tensor for piece in pieces}),
    )


def _cuts(piece: Piece) -> list[Cut]:
    return find_cuts(piece.region.shape, piece.source.stride_bytes, itemsize_bytes(piece.source.dtype))


def _choose_cut(piece: Piece, cost: ReadCost) -> Cut:
    """The cheapest cut within the allowed over-read; the finest one if none is."""
    cuts = _cuts(piece)
    if len(cuts) == 1:
        return cuts[0]
    most = cost.max_over_read * piece.nbytes
    allowed = [cut for cut in cuts if cut.nbytes <= most] or cuts[:1]
    return min(allowed, key=lambda cut: (cost.price_s(cut), cut.num_blocks))


def _assign_landing(
    pieces: Sequence[Piece], cuts: Sequence[Cut]
) -> tuple[dict[tuple[int, str], _Landed], int]:
    """Unite the byte ranges of every (trainer rank, window), and give each a place in the landing buffer."""
    ranges: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for piece, cut in zip(pieces, cuts, strict=True):
        offset = piece.source_offset_bytes
        steps = [piece.source.stride_bytes[dim] for dim in cut.outer_dims]
        held = ranges.setdefault((piece.trainer_rank, piece.source.window), set())
        for step in block_steps(cut, piece.region.shape, steps) if steps else (0,):
            held.add((offset + step, offset + step + cut.block_nbytes))
    landed: dict[tuple[int, str], _Landed] = {}
    end = 0
    for key in sorted(ranges):
        landed[key], end = _unite(sorted(ranges[key]), end)
    return landed, end


def _unite(ranges: Iterable[tuple[int, int]], end: int) -> tuple[_Landed, int]:
    """Merge ranges that overlap or touch, and place them from landing offset ``end`` on."""
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in ranges:
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    landings = []
    for start, stop in zip(starts, stops, strict=True):
        end += (start - end) % LANDING_ALIGNMENT_BYTES
        landings.append(end)
        end += stop - start
    return _Landed(starts, stops, landings), end


def _landing_strides(piece: Piece, cut: Cut, landed: _Landed) -> tuple[int, ...] | None:
    """Strides that find the piece in the landing buffer, one a dim; None when no strides do.

    Inside a block they are the source's own. From block to block they are whatever the placing made of
    them, so every block is compared with what the strides say.
    """
    if not cut.outer_dims:
        return piece.source.stride_bytes
    shape, strides = piece.region.shape, list(piece.source.stride_bytes)
    offset = piece.source_offset_bytes
    first = landed.locate(offset)
    source_steps = [strides[dim] for dim in cut.outer_dims]
    landing_steps = [landed.locate(offset + step) - first for step in source_steps]
    for source, landing in zip(
        block_steps(cut, shape, source_steps), block_steps(cut, shape, landing_steps), strict=True
    ):
        if landed.locate(offset + source) != first + landing:
            return None
    for dim, step in zip(cut.outer_dims, landing_steps, strict=True):
        strides[dim] = step
    return tuple(strides)


def _make_reads(landed: dict[tuple[int, str], _Landed]) -> dict[int, tuple[Read, ...]]:
    reads: dict[int, list[Read]] = {}
    for (trainer_rank, window), held in landed.items():
        reads.setdefault(trainer_rank, []).extend(
            Read(
                trainer_rank=trainer_rank,
                window=window,
                offset_bytes=start,
                nbytes=stop - start,
                landing_offset_bytes=landing,
            )
            for start, stop, landing in zip(held.starts, held.stops, held.landings, strict=True)
        )
    return {rank: tuple(found) for rank, found in reads.items()}


def _make_copy(piece: Piece, strides: tuple[int, ...], landed: _Landed) -> Copy:
    return Copy(
        tensor=piece.target.tensor,
        region=piece.region,
        source_dtype=piece.source.dtype,
        landing_offset_bytes=landed.locate(piece.source_offset_bytes),
        landing_stride_bytes=strides,
        window=piece.target.window,
        target_dtype=piece.target.dtype,
        target_offset_bytes=offset_of(piece.target, piece.region),
        target_stride_bytes=piece.target.stride_bytes,
    )


def _count_payload(pieces: Sequence[Piece]) -> int:
    """Bytes that are needed, those that several engine shards need counted once."""
    by_memory: dict[tuple[object, ...], list[Piece]] = {}
    for piece in pieces:
        source = piece.source
        memory = (piece.trainer_rank, source.window, source.offset_bytes, source.stride_bytes, source.dtype)
        by_memory.setdefault(memory, []).append(piece)
    return sum(_count_distinct(sharing) for sharing in by_memory.values())


def _count_distinct(pieces: Sequence[Piece]) -> int:
    """Bytes of pieces of one memory, each byte counted once."""
    if len(pieces) == 1:
        return pieces[0].nbytes
    regions = [_shift(piece.region, piece.source.region.start) for piece in pieces]
    return count_union(regions) * itemsize_bytes(pieces[0].source.dtype)


def _shift(region: Region, origin: tuple[int, ...]) -> Region:
    return Region(
        tuple(at - first for at, first in zip(region.start, origin, strict=True)),
        tuple(at - first for at, first in zip(region.stop, origin, strict=True)),
    )
