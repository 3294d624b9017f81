"""Turns pieces, strided boxes of trainer memory, into reads and landing-to-engine copies.

How every piece is read is chosen by :mod:`rdt_core.read_method`. A piece that goes by an arena becomes one
range of that arena. One that is read where it lies and is not contiguous is read as rows over links that
take them, and lands as a box of its own; over others it is cut into blocks (see
:class:`rdt_core.layout.Cut`). All ranges of one trainer window are then united, so that no byte of them is
read twice.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from rdt_core.arena import ARENA_WINDOW, ArenaItem, place_items
from rdt_core.coverage import count_union
from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import block_steps, offset_of, row_major_strides
from rdt_core.manifest import Shard
from rdt_core.plan import Copy, Plan, Read
from rdt_core.read_method import choose_methods, only_cut, read_as_span
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.layout import Cut
    from rdt_core.read_method import Method, Piece, ReadCost
    from rdt_core.row_blocks import Rows

# A landing offset equals its source offset modulo this, so that elements stay aligned and vector loads of
# 16 bytes stay possible where they were possible in the source.
LANDING_ALIGNMENT_BYTES = 16


class _Box(NamedTuple):
    """Rows that are read together and land end to end: a strided piece, or several of the same bytes."""

    trainer_rank: int
    window: str
    offset: int
    rows: tuple[Rows, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.rows)


@dataclass(slots=True)
class _Landing:
    """Where everything lands.

    Args:
        ranges: by trainer rank and window.
        boxes: landing offset of each.
        nbytes: of the landing buffer.
    """

    ranges: dict[tuple[int, str], _Landed] = field(default_factory=dict)
    boxes: dict[_Box, int] = field(default_factory=dict)
    nbytes: int = 0

    def of(self, piece: Piece) -> _Landed:
        """The ranges that a piece is one of."""
        return self.ranges[piece.trainer_rank, piece.source.window]


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


def lower_pieces(engine_rank: int, wanted: Sequence[Piece], cost: ReadCost) -> Plan:
    """The plan that brings every piece to its engine shard, copies in the order of ``wanted``."""
    methods = choose_methods(wanted, cost)
    pieces, arenas = _lay_out_arenas(wanted, methods)
    boxes = [_box_of(piece, method) for piece, method in zip(pieces, methods, strict=True)]
    ranged = [index for index, box in enumerate(boxes) if box is None]
    strides: dict[int, tuple[int, ...]] = {}
    while True:
        cuts = {index: methods[index].cut or only_cut(pieces[index]) for index in ranged}
        landed = _assign_landing([(pieces[index], cut) for index, cut in cuts.items()], boxes)
        irregular = []
        for index, cut in cuts.items():
            found = _landing_strides(pieces[index], cut, landed.of(pieces[index]))
            if found is None:
                irregular.append(index)
            else:
                strides[index] = found
        if not irregular:
            break
        # Blocks of other pieces lie between the blocks of these, so that no strides describe where they
        # landed: read them as one span each. Every round spans at least one more, so this ends.
        for index in irregular:
            methods[index] = read_as_span(pieces[index], "its runs would land unevenly")
    return Plan(
        engine_rank=engine_rank,
        reads=_make_reads(landed),
        arenas=arenas,
        copies=tuple(
            _make_copy(piece, method, landed.of(piece).locate(piece.source_offset_bytes), strides[index])
            if box is None
            else _make_copy(piece, method, landed.boxes[box], _dense_strides(piece))
            for index, (piece, method, box) in enumerate(zip(pieces, methods, boxes, strict=True))
        ),
        landing_nbytes=landed.nbytes,
        payload_nbytes=_count_payload([pieces[index] for index in ranged])
        + sum(box.nbytes for box in landed.boxes),
        num_tensors=len({piece.target.tensor for piece in pieces}),
    )


def _box_of(piece: Piece, method: Method) -> _Box | None:
    if not method.rows:
        return None
    return _Box(piece.trainer_rank, piece.source.window, piece.source_offset_bytes, method.rows)


def _dense_strides(piece: Piece) -> tuple[int, ...]:
    return row_major_strides(piece.region.shape, itemsize_bytes(piece.source.dtype))


def _lay_out_arenas(
    pieces: Sequence[Piece], methods: Sequence[Method]
) -> tuple[list[Piece], dict[int, tuple[ArenaItem, ...]]]:
    """The pieces as they lie once every trainer rank's arena is laid out, and the items of each."""
    items = {
        index: ArenaItem(
            piece.source.window,
            piece.source_offset_bytes,
            piece.region.shape,
            piece.source.stride_bytes,
            piece.source.dtype,
            method.dtype,
        )
        for index, (piece, method) in enumerate(zip(pieces, methods, strict=True))
        if method.goes_by_arena
    }
    by_rank: dict[int, dict[ArenaItem, int]] = {}
    for index, item in items.items():
        by_rank.setdefault(pieces[index].trainer_rank, {})[item] = 0
    for found in by_rank.values():
        found.update(zip(found, place_items(tuple(found))[0], strict=True))
    laid_out = list(pieces)
    for index, item in items.items():
        laid_out[index] = _in_arena(pieces[index], item, by_rank[pieces[index].trainer_rank][item])
    return laid_out, {rank: tuple(found) for rank, found in sorted(by_rank.items())}


def _in_arena(piece: Piece, item: ArenaItem, offset_bytes: int) -> Piece:
    return replace(
        piece,
        source=Shard(
            tensor=piece.source.tensor,
            region=piece.region,
            window=ARENA_WINDOW,
            offset_bytes=offset_bytes,
            stride_bytes=row_major_strides(item.shape, itemsize_bytes(item.dtype)),
            dtype=item.dtype,
        ),
        nbytes=item.nbytes,
        source_offset_bytes=offset_bytes,
    )


def _assign_landing(pieces: Iterable[tuple[Piece, Cut]], boxes: Iterable[_Box | None]) -> _Landing:
    """A place in the landing buffer for everything: by trainer rank its ranges, united, then its boxes."""
    ranges: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for piece, cut in pieces:
        offset = piece.source_offset_bytes
        steps = [piece.source.stride_bytes[dim] for dim in cut.outer_dims]
        held = ranges.setdefault((piece.trainer_rank, piece.source.window), set())
        for step in block_steps(cut, piece.region.shape, steps) if steps else (0,):
            held.add((offset + step, offset + step + cut.block_nbytes))
    by_rank: dict[int, list[tuple[int, str] | _Box]] = {}
    for key in sorted(ranges):
        by_rank.setdefault(key[0], []).append(key)
    for box in sorted({box for box in boxes if box is not None}):
        by_rank.setdefault(box.trainer_rank, []).append(box)
    landing = _Landing()
    for found in itertools.chain.from_iterable(by_rank[rank] for rank in sorted(by_rank)):
        if isinstance(found, _Box):
            landing.nbytes += (found.offset - landing.nbytes) % LANDING_ALIGNMENT_BYTES
            landing.boxes[found] = landing.nbytes
            landing.nbytes += found.nbytes
        else:
            # Items of an arena stay single: one that is shared with other readers lies apart from the rest.
            unite = _keep_apart if found[1] == ARENA_WINDOW else _unite
            landing.ranges[found], landing.nbytes = _land(unite(sorted(ranges[found])), landing.nbytes)
    return landing


def _unite(ranges: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and stops of the ranges, those that overlap or touch merged."""
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in ranges:
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    return starts, stops


def _keep_apart(ranges: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and stops of disjoint ranges."""
    found = list(ranges)
    return [start for start, _ in found], [stop for _, stop in found]


def _land(ranges: tuple[list[int], list[int]], end: int) -> tuple[_Landed, int]:
    """Give every range a place from landing offset ``end`` on."""
    landings = []
    for start, stop in zip(*ranges, strict=True):
        end += (start - end) % LANDING_ALIGNMENT_BYTES
        landings.append(end)
        end += stop - start
    return _Landed(*ranges, landings), end


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


def _make_reads(landing: _Landing) -> dict[int, tuple[Read, ...]]:
    reads: dict[int, list[Read]] = {}
    for (trainer_rank, window), held in landing.ranges.items():
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
    for box, lands_at in landing.boxes.items():
        at = lands_at
        for rows in box.rows:
            read = Read(
                trainer_rank=box.trainer_rank,
                window=box.window,
                offset_bytes=box.offset + rows.offset,
                nbytes=rows.nbytes,
                landing_offset_bytes=at,
                num_rows=rows.num_rows,
                pitch_bytes=rows.pitch,
            )
            reads.setdefault(box.trainer_rank, []).append(read)
            at += rows.nbytes
    return {rank: tuple(reads[rank]) for rank in sorted(reads)}


def _make_copy(piece: Piece, method: Method, lands_at: int, strides: tuple[int, ...]) -> Copy:
    return Copy(
        tensor=piece.target.tensor,
        region=piece.region,
        source_dtype=piece.source.dtype,
        landing_offset_bytes=lands_at,
        landing_stride_bytes=strides,
        window=piece.target.window,
        target_dtype=piece.target.dtype,
        target_offset_bytes=offset_of(piece.target, piece.region),
        target_stride_bytes=piece.target.stride_bytes,
        trainer_rank=piece.trainer_rank,
        method=method.name,
        reason=method.reason,
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
