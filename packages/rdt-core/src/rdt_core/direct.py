"""Which reads of a plan may land in the engine's own memory, and the plan that has them do so.

In-place mode has no room for a second copy of the weights. A read whose bytes are, piece by piece, what the
parameters hold (the same element type, contiguous on both sides) needs none: it is cut along its copies and
every part is aimed at its parameter. What is left, strided or converted, still goes through landing memory,
which shrinks to just that.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import is_contiguous, span_nbytes
from rdt_core.lowering import LANDING_ALIGNMENT_BYTES
from rdt_core.plan import DirectRead, Plan, Read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdt_core.plan import Copy


@dataclass(frozen=True, slots=True)
class _Span:
    """Landing bytes ``[start, stop)`` between a copy's first and last element."""

    start: int
    stop: int
    copy: Copy
    is_plain: bool


def aim_directly(plan: Plan, *, may_write: Callable[[str], bool]) -> Plan:
    """The same plan with every read that can land in its target doing so.

    Pure and deterministic. The bytes that cross the link stay the same; ``landing_nbytes`` falls to what
    cannot be aimed, 0 when all can.

    Args:
        plan: as made by the planner, all reads into landing memory.
        may_write: whether reads may land in the window of this name.
    """
    reads = sorted(
        (read for found in plan.reads.values() for read in found), key=lambda read: read.landing_offset_bytes
    )
    spans = [_span_of(copy, may_write) for copy in plan.copies]
    aimed = _find_aimed(reads, sorted(spans, key=lambda span: span.start))
    direct: dict[int, list[DirectRead]] = {}
    gone: set[int] = set()
    for index, inside in aimed.items():
        for span in inside:
            gone.add(id(span))
            direct.setdefault(reads[index].trainer_rank, []).append(_aim(reads[index], span))
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
    shape, itemsize = copy.region.shape, itemsize_bytes(copy.source_dtype)
    start = copy.landing_offset_bytes
    stop = start + span_nbytes(shape, copy.landing_stride_bytes, itemsize)
    is_plain = (
        copy.source_dtype == copy.target_dtype
        and _moving(shape, copy.landing_stride_bytes) == _moving(shape, copy.target_stride_bytes)
        and is_contiguous(shape, copy.landing_stride_bytes, itemsize)
        and may_write(copy.window)
    )
    return _Span(start, stop, copy, is_plain)


def _moving(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides of the dims along which there is more than one element."""
    return [stride for n, stride in zip(shape, strides, strict=True) if n > 1]


def _find_aimed(reads: Sequence[Read], spans: Sequence[_Span]) -> dict[int, list[_Span]]:
    """By index of the read: the spans that tile it, for reads that are tiled by plain copies of their own."""
    inside: list[list[_Span]] = [[] for _ in reads]
    starts = [read.landing_offset_bytes for read in reads]
    for span in spans:
        index = bisect_right(starts, span.start) - 1
        while index < len(reads) and starts[index] < max(span.stop, span.start + 1):
            inside[index].append(span)
            index += 1
    return {
        index: found
        for index, (read, found) in enumerate(zip(reads, inside, strict=True))
        if _is_tiled(read, found)
    }


def _is_tiled(read: Read, spans: Sequence[_Span]) -> bool:
    at = read.landing_offset_bytes
    for span in spans:
        # A span that begins in another read, or ends in one, is not this read's alone.
        if not span.is_plain or span.start != at:
            return False
        at = span.stop
    return at == read.landing_offset_bytes + read.nbytes


def _aim(read: Read, span: _Span) -> DirectRead:
    return DirectRead(
        trainer_rank=read.trainer_rank,
        window=read.window,
        offset_bytes=read.offset_bytes + span.start - read.landing_offset_bytes,
        nbytes=span.stop - span.start,
        target_window=span.copy.window,
        target_offset_bytes=span.copy.target_offset_bytes,
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
