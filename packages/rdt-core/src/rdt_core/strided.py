"""Strided sets of elements: cut into boxes of a shape, and found in lists of element numbers.

The recorder describes every copy of an engine's loader as a :class:`Pairing`: which element of a source
storage goes to which byte of a target. Geometry only: nothing here
knows of models.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_MERGE_PASSES = 64


class TooManyBoxesError(Exception):
    """A selection is too ragged to be moved box by box; the tensor goes to the reload path."""


class Axis(NamedTuple):
    """One loop of a pairing: ``length`` steps, each so far on in the source and so far on in the target."""

    length: int
    source_step: int
    target_step: int


class Pairing(NamedTuple):
    """Source elements and the target bytes they go to: the nested loops ``axes`` from one first pair.

    ``source`` and the source steps count elements of the source storage, ``target`` and the target steps
    bytes of the target storage. The order of the axes carries no meaning.
    """

    source: int
    target: int
    axes: tuple[Axis, ...]

    @property
    def num_pairs(self) -> int:
        """How many elements are copied."""
        return math.prod(axis.length for axis in self.axes)


class Box(NamedTuple):
    """A box of a row-major array, and where its elements go: one target step in bytes a dim."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    target: int
    target_steps: tuple[int, ...]


class _Cursor(NamedTuple):
    """What is left to cut: ``pairing`` within one row of dim ``len(boxed) - 1``."""

    pairing: Pairing
    boxed: tuple[tuple[int, int, int], ...]  # (start, count, target step) of every dim settled so far


def row_major_steps(shape: Sequence[int]) -> tuple[int, ...]:
    """Distance in elements between neighbours along each dim of a contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def is_gapless(lengths: Iterable[int], steps: Iterable[int], unit: int) -> bool:
    """Whether nested loops visit every place of their span once, ``unit`` apart, in whatever order."""
    expected = unit
    for length, step in sorted(zip(lengths, steps, strict=True), key=operator.itemgetter(1)):
        if length == 1:
            continue
        if step != expected:
            return False
        expected *= length
    return True


def cut_into_boxes(pairing: Pairing, shape: Sequence[int], *, limit: int) -> list[Box]:
    """Disjoint boxes of a row-major array of ``shape`` that hold exactly the pairing's elements.

    Whatever views led to the pairing, merged and split dims included: a loop that crosses rows is split
    where it crosses, one that skips rows is walked step by step.

    Raises:
        TooManyBoxesError: it takes more than ``limit`` boxes.
    """
    if any(axis.length == 0 for axis in pairing.axes) or 0 in shape:
        return []
    steps = row_major_steps(shape)
    todo = [_Cursor(pairing._replace(axes=_join_axes(pairing.axes)), ())]
    boxes: list[Box] = []
    while todo:
        cursor = todo.pop()
        if len(cursor.boxed) == len(shape) and not cursor.pairing.axes:
            boxes.append(_make_box(cursor))
        else:
            todo.extend(_advance(cursor, steps, limit))
        if len(todo) + len(boxes) > limit:
            raise TooManyBoxesError
    return boxes


def _join_axes(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Widest source step first; loops that continue each other on both sides become one."""
    joined: list[Axis] = []
    for axis in sorted((a for a in axes if a.length > 1), key=lambda a: a.source_step, reverse=True):
        if joined:
            last, step = joined[-1], (axis.length * axis.source_step, axis.length * axis.target_step)
            if (last.source_step, last.target_step) == step:
                joined[-1] = axis._replace(length=last.length * axis.length)
                continue
        joined.append(axis)
    return tuple(joined)


def _advance(cursor: _Cursor, steps: Sequence[int], limit: int) -> list[_Cursor]:
    """Settle one more dim, or split the cursor into parts that can be settled."""
    pairing, boxed = cursor
    for axis in pairing.axes:
        if axis.source_step <= 0:  # a broadcast or a reversed loop
            return _walk(cursor, axis, limit)
    row = steps[len(boxed)]
    inner = [axis for axis in pairing.axes if axis.source_step < row]
    first = pairing.source % row
    if first + _span(inner) > row:
        return _split_at_row_end(cursor, inner, row)
    outer = [axis for axis in pairing.axes if axis.source_step >= row]
    unit = max((axis for axis in outer if axis.source_step == row), default=None)
    for axis in outer:
        if axis is not unit:
            return _walk(cursor, axis, limit)
    settled = (pairing.source // row, *((1, 0) if unit is None else (unit.length, unit.target_step)))
    return [_Cursor(Pairing(first, pairing.target, tuple(inner)), (*boxed, settled))]


def _span(axes: Iterable[Axis]) -> int:
    return 1 + sum((axis.length - 1) * axis.source_step for axis in axes)


def _walk(cursor: _Cursor, axis: Axis, limit: int) -> list[_Cursor]:
    """One cursor for every step of ``axis``, in reverse, since the caller works from the end."""
    if axis.length > limit:
        raise TooManyBoxesError
    return [_part(cursor, axis, first, 1) for first in reversed(range(axis.length))]


def _part(cursor: _Cursor, axis: Axis, first: int, count: int, *instead: Axis) -> _Cursor:
    """The cursor with ``count`` steps of ``axis`` from ``first`` on, or with the axes ``instead`` of it."""
    pairing = cursor.pairing
    shortened = instead or (Axis(count, axis.source_step, axis.target_step),)
    position = pairing.axes.index(axis)
    axes = (*pairing.axes[:position], *shortened, *pairing.axes[position + 1 :])
    return cursor._replace(
        pairing=Pairing(
            pairing.source + first * axis.source_step,
            pairing.target + first * axis.target_step,
            tuple(sorted((a for a in axes if a.length > 1), key=lambda a: a.source_step, reverse=True)),
        )
    )


def _split_at_row_end(cursor: _Cursor, inner: Sequence[Axis], row: int) -> list[_Cursor]:
    """Split the widest loop of those inside a row of ``row`` elements, which runs over the row's end."""
    axis = inner[0]
    room = row - cursor.pairing.source % row - _span(inner[1:])
    if room < 0:
        return [_part(cursor, axis, 1, axis.length - 1), _part(cursor, axis, 0, 1)]
    fits = room // axis.source_step + 1
    if fits * axis.source_step != row:
        return [_part(cursor, axis, fits, axis.length - fits), _part(cursor, axis, 0, fits)]
    num_rows, rest = divmod(axis.length, fits)
    rows = Axis(num_rows, row, fits * axis.target_step)
    whole = _part(cursor, axis, 0, 0, rows, Axis(fits, axis.source_step, axis.target_step))
    return [whole] if rest == 0 else [_part(cursor, axis, num_rows * fits, rest), whole]


def _make_box(cursor: _Cursor) -> Box:
    start = tuple(first for first, _, _ in cursor.boxed)
    shape = tuple(count for _, count, _ in cursor.boxed)
    return Box(start, shape, cursor.pairing.target, tuple(step for _, _, step in cursor.boxed))


def find_pairings(source: torch.Tensor, target: torch.Tensor, *, limit: int) -> list[Pairing]:
    """Few pairings that hold exactly the pairs ``(source[i], target[i])``, found without a loop over pairs.

    Runs of equal steps become loops; runs of equal loops become outer loops, until nothing joins.

    Args:
        source: element numbers, one-dimensional int64.
        target: byte offsets, of the same length.
        limit: largest number of pairings.

    Raises:
        TooManyBoxesError: more than ``limit`` are needed.
    """
    kinds: list[tuple[Axis, ...]] = [()]
    kind = torch.zeros_like(source)
    for _ in range(MAX_MERGE_PASSES):
        found = _most_common_step(source, target, kind)
        if found is None:
            break
        source_step, target_step, linked = found
        is_first = torch.cat([linked.new_ones(1), ~linked])
        first = is_first.nonzero().squeeze(1)
        counts = torch.diff(first, append=first.new_tensor([len(source)]))
        pairs, renumbered = torch.unique(torch.stack([kind[first], counts]), dim=1, return_inverse=True)
        kinds = [
            (Axis(count, source_step, target_step), *kinds[old]) if count > 1 else kinds[old]
            for old, count in pairs.t().tolist()
        ]
        source, target, kind = source[first], target[first], renumbered
    if len(source) > limit:
        raise TooManyBoxesError
    return [
        Pairing(first_source, first_target, kinds[index])
        for first_source, first_target, index in zip(
            source.tolist(), target.tolist(), kind.tolist(), strict=True
        )
    ]


def _most_common_step(
    source: torch.Tensor, target: torch.Tensor, kind: torch.Tensor
) -> tuple[int, int, torch.Tensor] | None:
    """The step between neighbours of one kind seen most, and where; None when none are of one kind."""
    source_steps, target_steps = torch.diff(source), torch.diff(target)
    alike = kind[1:] == kind[:-1]
    candidates = alike.nonzero().squeeze(1)
    if len(candidates) == 0:
        return None
    # The mixed key may collide; that only makes for a poorer choice, since both steps are compared below.
    keys = source_steps[candidates] * 1_000_003 + target_steps[candidates]
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    chosen = candidates[(inverse == counts.argmax()).nonzero()[0, 0]]
    linked = alike & (source_steps == source_steps[chosen]) & (target_steps == target_steps[chosen])
    return int(source_steps[chosen]), int(target_steps[chosen]), linked
