"""Strided copies as blocks of rows, the form in which one GPU kernel takes any number of them.

Geometry only: imports neither torch nor ray.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_ROW_NBYTES = 16
"""Below this a copy of rows is a transposition, for which there are better kernels."""

MAX_BLOCKS = 4096
"""Of one copy: what would be cut into more is too ragged."""


class RowBlock(NamedTuple):
    """So many rows of one size, equally far apart in the source and equally far apart in the target.

    Args:
        source: address of the first row, or its offset in bytes.
        target: likewise.
        row_nbytes: of every row.
        num_rows: how many.
        source_pitch: bytes from row to row in the source.
        target_pitch: likewise in the target.
    """

    source: int
    target: int
    row_nbytes: int
    num_rows: int = 1
    source_pitch: int = 0
    target_pitch: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.row_nbytes * self.num_rows


class _Axis(NamedTuple):
    length: int
    source_step: int
    target_step: int


def find_row_blocks(
    shape: Sequence[int], source_steps: Sequence[int], target_steps: Sequence[int], itemsize: int
) -> list[RowBlock] | None:
    """The copy of a box, element by element, as blocks of rows; None where it is not made of rows.

    Args:
        shape: of the box, in elements.
        source_steps: bytes between neighbours in the source, one a dim, not negative.
        target_steps: likewise in the target.
        itemsize: bytes of an element.

    Returns:
        Blocks whose addresses are offsets from the first element on either side; together they are every
        element once. Empty for an empty box.
    """
    if 0 in shape:
        return []
    row_nbytes, axes = _join(shape, source_steps, target_steps, itemsize)
    if not axes:
        return [RowBlock(0, 0, row_nbytes)]
    *outer, rows = axes
    num_blocks = 1
    for axis in outer:
        num_blocks *= axis.length
    if row_nbytes < MIN_ROW_NBYTES or num_blocks > MAX_BLOCKS:
        return None
    steps = itertools.product(*(range(axis.length) for axis in outer))
    return [
        RowBlock(
            sum(n * axis.source_step for n, axis in zip(at, outer, strict=True)),
            sum(n * axis.target_step for n, axis in zip(at, outer, strict=True)),
            row_nbytes,
            rows.length,
            rows.source_step,
            rows.target_step,
        )
        for at in steps
    ]


def _join(
    shape: Sequence[int], source_steps: Sequence[int], target_steps: Sequence[int], itemsize: int
) -> tuple[int, list[_Axis]]:
    """Bytes of a row that is contiguous on both sides, and the axes around it, joined as far as they go."""
    row_nbytes = itemsize
    axes: list[_Axis] = []
    for axis in map(_Axis, reversed(shape), reversed(source_steps), reversed(target_steps)):
        if axis.length == 1:
            continue
        if not axes and axis.source_step == axis.target_step == row_nbytes:
            row_nbytes *= axis.length
            continue
        inner = axes[-1] if axes else None
        if inner is not None and _continues(axis, inner):
            axes[-1] = inner._replace(length=inner.length * axis.length)
        else:
            axes.append(axis)
    return row_nbytes, axes[::-1]


def _continues(axis: _Axis, inner: _Axis) -> bool:
    source, target = inner.length * inner.source_step, inner.length * inner.target_step
    return (axis.source_step, axis.target_step) == (source, target)
