"""Copies of boxes as blocks of rows: every element once, from where it lies to where it goes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rdt_core.layout import row_major_strides
from rdt_core.row_blocks import MAX_BLOCKS, MIN_ROW_NBYTES, RowBlock, find_row_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


def places(shape: Sequence[int], steps: Sequence[int], itemsize: int) -> list[int]:
    """The byte offset of every byte of a box, in row-major order of its elements."""
    return [
        sum(i * step for i, step in zip(at, steps, strict=True)) + byte
        for at in itertools.product(*map(range, shape))
        for byte in range(itemsize)
    ]


def moves(blocks: Sequence[RowBlock]) -> list[tuple[int, int]]:
    """(source, target) of every byte that blocks copy."""
    return [
        (block.source + row * block.source_pitch + at, block.target + row * block.target_pitch + at)
        for block in blocks
        for row in range(block.num_rows)
        for at in range(block.row_nbytes)
    ]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], tuple[int, ...], tuple[int, ...], int]:
    """A box inside of two larger arrays."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    wholes = [[n + draw(st.integers(0, 3)) for n in shape] for _ in range(2)]
    source, target = (row_major_strides(whole, itemsize) for whole in wholes)
    return shape, source, target, itemsize


@given(boxes())
def test_blocks_copy_every_byte_of_a_box_once(
    box: tuple[list[int], tuple[int, ...], tuple[int, ...], int],
) -> None:
    shape, source, target, itemsize = box
    blocks = find_row_blocks(shape, source, target, itemsize)
    if blocks is None:
        return
    wanted = zip(places(shape, source, itemsize), places(shape, target, itemsize), strict=True)
    assert sorted(moves(blocks)) == sorted(wanted)


def test_a_column_block_is_one_block_of_rows() -> None:
    assert find_row_blocks((2048, 384), (1536, 2), (768, 2), 2) == [RowBlock(0, 0, 768, 2048, 1536, 768)]


def test_a_contiguous_box_is_one_row() -> None:
    assert find_row_blocks((7, 1, 30), (120, 999, 4), (120, 5, 4), 4) == [RowBlock(0, 0, 840)]


def test_column_blocks_of_experts_are_a_block_each_where_the_target_has_gaps_between_them() -> None:
    blocks = find_row_blocks((3, 8, 16), (8 * 64, 64, 2), (1000, 32, 2), 2)
    assert blocks == [RowBlock(512 * n, 1000 * n, 32, 8, 64, 32) for n in range(3)]


def test_a_transposition_is_not_made_of_rows() -> None:
    assert find_row_blocks((64, 64), (2, 128), (128, 2), 2) is None
    assert find_row_blocks((9, MIN_ROW_NBYTES // 2 - 1), (64, 2), (32, 2), 2) is None


def test_what_would_be_too_many_blocks_is_left_to_others() -> None:
    shape = (MAX_BLOCKS + 1, 2, 32)
    assert find_row_blocks(shape, (1000, 100, 2), (500, 64, 2), 2) is None
    assert find_row_blocks((MAX_BLOCKS, *shape[1:]), (1000, 100, 2), (500, 64, 2), 2) is not None
