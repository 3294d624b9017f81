"""Which reads of a plan may land in the engine's own memory, and the plan that has them do so.

In-place mode has no room for a second copy of the weights. Reads whose bytes are, piece by piece, what the
parameters hold need none: of the same element type, and in the same order. They are cut along their copies
and every part is aimed at its parameter; over links that take rows whatever the strides on either side,
over others where each part is contiguous on both. What is left, converted or transposed, still goes through
landing memory, which shrinks to just that.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import span_nbytes
from rdt_core.lowering import LANDING_ALIGNMENT_BYTES
from rdt_core.plan import DirectRead, Plan, Read
from rdt_core.row_blocks import Rows, find_row_blocks, join_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdt_core.plan import Copy
    from rdt_core.row_blocks import RowBlock


@dataclass(frozen=True, slots=True)
class _Span:
    """Landing bytes ``[start, stop)`` between a copy's first and last element.

    ``targets`` is where they go, in order; None for bytes that cannot be aimed.
    """

    start: int
    stop: int
    copy: Copy
    targets: tuple[Rows, ...] | None


@dataclass(slots=True)
class _Group:
    """Reads and the spans that take of them: neighbours in landing memory that share nothing with others."""

    reads: list[int] = field(default_factory=list)
    spans: dict[int, _Span] = field(default_factory=dict)


def aim_directly(
    plan: Plan, *, may_write: Callable[[str], bool], takes_rows: Callable[[int], bool] = lambda _: False
) -> Plan:
    """The same plan with every read that can land in its target doing so.

    Pure and deterministic. The bytes that cross the link stay the same; ``landing_nbytes`` falls to what
    cannot be aimed, 0 when all can.

    Args:
        plan: as made by the planner, all reads into landing memory.
        may_write: whether reads may land in the window of this name.
        takes_rows: whether the link to this trainer rank takes rows.
    """
    reads = sorted(
        (read for found in plan.reads.values() for read in found), key=lambda read: read.landing_offset_bytes
    )
    spans = [_span_of(copy, may_write) for copy in plan.copies]
    direct: dict[int, list[DirectRead]] = {}
    aimed: set[int] = set()
    gone: set[int] = set()
    for group in _find_groups(reads, sorted(spans, key=lambda span: span.start)):
        found = _aim([reads[index] for index in group.reads], [*group.spans.values()], takes_rows)
        if found:
            direct.setdefault(found[0].trainer_rank, []).extend(found)
            aimed.update(group.reads)
            gone.update(group.spans)
    kept, shifts = _close_gaps([None if index in aimed else read for index, read in enumerate(reads)])
    starts = [read.landing_offset_bytes for read in reads]
    return dataclasses.replace(
        plan,
        reads=_by_rank(kept),
        direct={rank: tuple(found) for rank, found in sorted(direct.items())},
        copies=tuple(
            dataclasses.replace(
                span.copy,
                landing_offset_bytes=span.start - shifts[bisect_right(starts, span.start) - 1],
            )
            for span in spans
            if id(span) not in gone
        ),
        landing_nbytes=max((read.landing_offset_bytes + read.nbytes for read in kept), default=0),
    )


def _span_of(copy: Copy, may_write: Callable[[str], bool]) -> _Span:
    start = copy.landing_offset_bytes
    stop = start + span_nbytes(
        copy.region.shape, copy.landing_stride_bytes, itemsize_bytes(copy.source_dtype)
    )
    is_alike = copy.source_dtype == copy.target_dtype and may_write(copy.window)
    return _Span(start, stop, copy, _find_targets(copy, stop - start) if is_alike else None)


def _find_targets(copy: Copy, nbytes: int) -> tuple[Rows, ...] | None:
    """Where the landing bytes of a copy go, in their order; None where they have gaps or are transposed."""
    dims = sorted(range(len(copy.region.shape)), key=copy.landing_stride_bytes.__getitem__, reverse=True)
    shape, landing, target = (
        [of_dim[dim] for dim in dims]
        for of_dim in (copy.region.shape, copy.landing_stride_bytes, copy.target_stride_bytes)
    )
    blocks = find_row_blocks(shape, landing, target, itemsize_bytes(copy.source_dtype))
    if blocks is None or not _are_end_to_end(blocks, nbytes):
        return None
    return tuple(
        Rows(
            copy.target_offset_bytes + block.target,
            block.row_nbytes,
            block.num_rows,
            block.target_pitch if block.num_rows > 1 else 0,
        )
        for block in blocks
    )


def _are_end_to_end(blocks: Sequence[RowBlock], nbytes: int) -> bool:
    """Whether the blocks' sources are all bytes up to ``nbytes``, in order."""
    at = 0
    for block in blocks:
        if block.source != at or (block.num_rows > 1 and block.source_pitch != block.row_nbytes):
            return False
        at += block.nbytes
    return at == nbytes


def _find_groups(reads: Sequence[Read], spans: Sequence[_Span]) -> list[_Group]:
    """All reads and the spans that lie in them, by what they have in common."""
    inside: list[list[_Span]] = [[] for _ in reads]
    starts = [read.landing_offset_bytes for read in reads]
    for span in spans:
        index = bisect_right(starts, span.start) - 1
        while index < len(reads) and starts[index] < max(span.stop, span.start + 1):
            inside[index].append(span)
            index += 1
    groups: list[_Group] = []
    for index, found in enumerate(inside):
        if not groups or not any(id(span) in groups[-1].spans for span in found):
            groups.append(_Group())
        groups[-1].reads.append(index)
        groups[-1].spans |= {id(span): span for span in found}
    return groups


def _aim(
    reads: Sequence[Read], spans: Sequence[_Span], takes_rows: Callable[[int], bool]
) -> list[DirectRead]:
    """The reads of one group, cut along its spans and aimed at their targets; empty where they cannot be.

    All are of one window of one trainer rank: so is each piece, and reads meet in none but their own.
    """
    if not _are_tiled(reads, spans):
        return []
    aimed: list[DirectRead] = []
    for span in spans:
        sources = [
            part
            for read in reads
            for part in read.source.cut(
                max(0, span.start - read.landing_offset_bytes),
                min(read.nbytes, span.stop - read.landing_offset_bytes),
            )
        ]
        blocks = join_rows(sources, span.targets or ())
        if blocks is None:
            return []
        aimed += [_make_direct(reads[0], span.copy.window, block) for block in blocks]
    if takes_rows(reads[0].trainer_rank) or all(read.num_rows == 1 for read in aimed):
        return aimed
    return []


def _are_tiled(reads: Sequence[Read], spans: Sequence[_Span]) -> bool:
    """Whether the spans can all be aimed and are, end to end, just the bytes that the reads bring."""
    ends = [read.landing_offset_bytes + read.nbytes for read in reads]
    if any(end != read.landing_offset_bytes for end, read in zip(ends, reads[1:], strict=False)):
        return False
    at = reads[0].landing_offset_bytes
    for span in spans:
        if span.targets is None or span.start != at:
            return False
        at = span.stop
    return at == ends[-1]


def _make_direct(read: Read, window: str, block: RowBlock) -> DirectRead:
    return DirectRead(
        trainer_rank=read.trainer_rank,
        window=read.window,
        offset_bytes=block.source,
        nbytes=block.nbytes,
        num_rows=block.num_rows,
        pitch_bytes=block.source_pitch,
        target_window=window,
        target_offset_bytes=block.target,
        target_pitch_bytes=block.target_pitch,
    )


def _close_gaps(reads: Sequence[Read | None]) -> tuple[list[Read], list[int]]:
    """Move what is left (None: aimed elsewhere) towards landing offset 0; and by how much each read moved.

    Reads between which none was taken out keep their distance, so that a copy over several finds them, and
    every shift is a multiple of the alignment.
    """
    kept: list[Read] = []
    shifts: list[int] = []
    shift = end = 0
    is_gap = False
    for read in reads:
        if read is None:
            is_gap = True
            shifts.append(shift)
            continue
        if is_gap:
            free = read.landing_offset_bytes - end
            shift, is_gap = free - free % LANDING_ALIGNMENT_BYTES, False
        moved = dataclasses.replace(read, landing_offset_bytes=read.landing_offset_bytes - shift)
        end = moved.landing_offset_bytes + moved.nbytes
        kept.append(moved)
        shifts.append(shift)
    return kept, shifts


def _by_rank(reads: Sequence[Read]) -> dict[int, tuple[Read, ...]]:
    found: dict[int, list[Read]] = {}
    for read in reads:
        found.setdefault(read.trainer_rank, []).append(read)
    return {rank: tuple(of_rank) for rank, of_rank in sorted(found.items())}
