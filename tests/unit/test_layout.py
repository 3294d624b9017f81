from __future__ import annotations

import itertools
import math
from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from rdt_core.layout import block_steps, find_cuts, is_contiguous, row_major_strides, span_nbytes

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Shapes with strides of any kind: dense, padded, permuted, repeated (0) or overlapping."""
    itemsize = draw(st.sampled_from((1, 2, 4)))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    if draw(st.booleans()):
        return shape, tuple(itemsize * draw(st.integers(0, 20)) for _ in shape), itemsize
    strides, step = [0] * len(shape), itemsize
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = step
        step *= shape[dim] + draw(st.integers(0, 2))
    return shape, tuple(strides), itemsize


def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Byte offset of every element from the first, by brute force."""
    return [
        sum(index * stride for index, stride in zip(at, strides, strict=True))
        for at in itertools.product(*map(range, shape))
    ]


def bytes_of(box: Box) -> set[int]:
    shape, strides, itemsize = box
    return {offset + byte for offset in offsets(shape, strides) for byte in range(itemsize)}


def test_row_major_strides_step_over_the_faster_dims() -> None:
    assert row_major_strides((2, 3, 5), 4) == (60, 20, 4)
    assert row_major_strides((), 4) == ()


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.sampled_from((1, 2, 4)))
def test_row_major_strides_are_contiguous(shape: tuple[int, ...], itemsize: int) -> None:
    strides = row_major_strides(shape, itemsize)
    assert is_contiguous(shape, strides, itemsize)
    assert span_nbytes(shape, strides, itemsize) == math.prod(shape) * itemsize


@given(boxes())
def test_a_span_reaches_from_the_first_to_behind_the_last_element(box: Box) -> None:
    assert span_nbytes(*box) == max(bytes_of(box)) + 1


def test_an_empty_box_has_no_span() -> None:
    assert span_nbytes((3, 0), (8, 2), 2) == 0


@given(boxes())
def test_a_box_is_contiguous_when_its_elements_fill_their_span_once(box: Box) -> None:
    shape, _, itemsize = box
    fills = len(bytes_of(box)) == span_nbytes(*box) == math.prod(shape) * itemsize
    # The converse need not hold: dims may fill a span in ways that no order of strides explains.
    assert fills or not is_contiguous(*box)


@given(boxes())
def test_every_cut_holds_all_bytes_of_the_box_in_ascending_disjoint_blocks(box: Box) -> None:
    shape, strides, _ = box
    for cut in find_cuts(*box):
        steps = list(block_steps(cut, shape, [strides[dim] for dim in cut.outer_dims]))
        assert len(steps) == cut.num_blocks
        assert all(one + cut.block_nbytes <= other for one, other in itertools.pairwise(steps))
        held = {step + byte for step in steps for byte in range(cut.block_nbytes)}
        assert held >= bytes_of(box)
        assert len(held) == cut.nbytes


@given(boxes())
def test_cuts_run_from_the_finest_to_the_one_enclosing_span(box: Box) -> None:
    cuts = find_cuts(*box)
    assert cuts[-1].outer_dims == ()
    assert cuts[-1].block_nbytes == span_nbytes(*box)
    assert all(one.num_blocks > other.num_blocks for one, other in itertools.pairwise(cuts))
    assert all(one.nbytes <= other.nbytes for one, other in itertools.pairwise(cuts))


@given(boxes())
def test_the_finest_cut_of_a_padded_or_permuted_box_has_no_gap(box: Box) -> None:
    shape, strides, itemsize = box
    distinct = len(set(offsets(shape, strides))) == math.prod(shape)
    finest = find_cuts(*box)[0]
    if distinct and len(find_cuts(*box)) == len([n for n in shape if n > 1]) + 1:
        assert finest.nbytes == len(bytes_of(box)) == math.prod(shape) * itemsize


def test_columns_of_a_row_major_matrix_are_cut_by_row() -> None:
    runs, span = find_cuts((3, 2), (10, 2), 2)
    assert (runs.block_nbytes, runs.num_blocks, runs.outer_dims) == (4, 3, (0,))
    assert (span.block_nbytes, span.num_blocks) == (24, 1)


def test_a_block_of_three_dims_can_be_cut_at_two_levels() -> None:
    cuts = find_cuts((2, 3, 4), (1000, 100, 2), 2)
    assert [cut.num_blocks for cut in cuts] == [6, 2, 1]
    assert [cut.block_nbytes for cut in cuts] == [8, 208, 1208]


def test_rows_of_a_row_major_matrix_are_one_run() -> None:
    (cut,) = find_cuts((3, 5), (10, 2), 2)
    assert cut.block_nbytes == 30
