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


class Rows(NamedTuple):
    """Bytes of one memory: so many rows of one size, equally far apart.

    Args:
        offset: of the first byte.
        row_nbytes: of every row.
        num_rows: how many.
        pitch: bytes from row to row; 0 for a single one.
    """

    offset: int
    row_nbytes: int
    num_rows: int = 1
    pitch: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.row_nbytes * self.num_rows

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.offset + (self.num_rows - 1) * self.pitch + self.row_nbytes

    def cut(self, first: int, last: int) -> list[Rows]:
        """Those of the rows' bytes that are number ``first`` up to ``last``, counted along the rows."""
        return [
            Rows(
                self.offset + part.row * self.pitch + part.at,
                part.nbytes,
                part.num_rows,
                self.pitch if part.num_rows > 1 else 0,
            )
            for part in slice_rows(self.row_nbytes, first, last)
        ]


class RowSlice(NamedTuple):
    """The same bytes of each of some neighbouring rows.

    Args:
        row: the first.
        num_rows: how many.
        at: the first byte, in every row.
        nbytes: of every row.
    """

    row: int
    num_rows: int
    at: int
    nbytes: int


def slice_rows(row_nbytes: int, first: int, last: int) -> list[RowSlice]:
    """Bytes number ``first`` up to ``last`` of rows laid end to end: a rest, whole rows, a beginning."""
    slices = []
    while first < last:
        row, at = divmod(first, row_nbytes)
        if at or last - first < row_nbytes:
            found = RowSlice(row, 1, at, min(row_nbytes - at, last - first))
        else:
            found = RowSlice(row, (last - first) // row_nbytes, 0, row_nbytes)
        slices.append(found)
        first += found.num_rows * found.nbytes
    return slices


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


def join_rows(sources: Sequence[Rows], targets: Sequence[Rows]) -> list[RowBlock] | None:
    """The copy of one list of bytes to another of as many, in order; None where it is too ragged."""
    blocks: list[RowBlock] = []
    source, target = _Walk(sources), _Walk(targets)
    while source.is_left and target.is_left:
        if len(blocks) == MAX_BLOCKS:
            return None
        row_nbytes = min(source.row_left, target.row_left)
        num_rows = min(source.count(row_nbytes), target.count(row_nbytes))
        pitches = (source.pitch(row_nbytes), target.pitch(row_nbytes)) if num_rows > 1 else (0, 0)
        blocks.append(RowBlock(source.place, target.place, row_nbytes, num_rows, *pitches))
        source.skip(row_nbytes * num_rows)
        target.skip(row_nbytes * num_rows)
    return blocks


class _Walk:
    """A place in a list of rows, byte by byte along them."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = [part for part in parts if part.nbytes]
        self._index = 0
        self._done = 0  # bytes of the part at the index

    @property
    def is_left(self) -> bool:
        return self._index < len(self._parts)

    @property
    def place(self) -> int:
        part = self._parts[self._index]
        row, at = divmod(self._done, part.row_nbytes)
        return part.offset + row * part.pitch + at

    @property
    def row_left(self) -> int:
        """Bytes of the row that are still to come."""
        part = self._parts[self._index]
        return part.row_nbytes - self._done % part.row_nbytes

    def count(self, row_nbytes: int) -> int:
        """How many rows of this size, none longer than what is left of one, follow equally far apart."""
        part = self._parts[self._index]
        if row_nbytes == part.row_nbytes:  # then the walk is between two rows
            return part.num_rows - self._done // part.row_nbytes
        return self.row_left // row_nbytes

    def pitch(self, row_nbytes: int) -> int:
        part = self._parts[self._index]
        return part.pitch if row_nbytes == part.row_nbytes and part.num_rows > 1 else row_nbytes

    def skip(self, nbytes: int) -> None:
        self._done += nbytes
        if self._done == self._parts[self._index].nbytes:
            self._index, self._done = self._index + 1, 0
