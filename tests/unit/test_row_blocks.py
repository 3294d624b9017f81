"""Copies of boxes as blocks of rows: every element once, from where it lies to where it goes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rdt_core.layout import row_major_strides
from rdt_core.row_blocks import (
    MAX_BLOCKS,
    MIN_ROW_NBYTES,
    RowBlock,
    Rows,
    find_row_blocks,
    join_rows,
    slice_rows,
)
from tests.unit.oracle import offsets_of

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


@st.composite
def rows_of(draw: st.DrawFn, nbytes: int) -> list[Rows]:
    """So many bytes in all, as rows that lie apart or not."""
    parts = []
    while nbytes:
        row_nbytes = draw(st.integers(1, nbytes))
        num_rows = draw(st.integers(1, nbytes // row_nbytes))
        pitch = row_nbytes + draw(st.integers(0, 5)) if num_rows > 1 else 0
        parts.append(Rows(draw(st.integers(0, 99)), row_nbytes, num_rows, pitch))
        nbytes -= row_nbytes * num_rows
    return parts


def bytes_of(parts: Sequence[Rows]) -> list[int]:
    return [at for part in parts for at in offsets_of(part)]


@given(st.integers(1, 60).flatmap(lambda nbytes: st.tuples(rows_of(nbytes), rows_of(nbytes))))
def test_joined_rows_copy_the_bytes_of_one_list_to_those_of_the_other_in_order(
    sides: tuple[list[Rows], list[Rows]],
) -> None:
    blocks = join_rows(*sides)
    assert blocks is not None
    assert moves(blocks) == list(zip(*map(bytes_of, sides), strict=True))


def test_what_joins_of_itself_is_one_block() -> None:
    columns, dense = Rows(8, 768, 2048, 1536), Rows(0, 768 * 2048)
    assert join_rows([columns], [dense]) == [RowBlock(8, 0, 768, 2048, 1536, 768)]
    assert join_rows([dense], [columns]) == [RowBlock(0, 8, 768, 2048, 768, 1536)]
    assert join_rows([columns], [columns]) == [RowBlock(8, 8, 768, 2048, 1536, 1536)]
    assert join_rows([dense], [dense]) == [RowBlock(0, 0, 768 * 2048)]


def test_rows_that_never_meet_are_left_to_others() -> None:
    narrow, wide = Rows(0, 7, 11 * MAX_BLOCKS, 20), Rows(0, 11, 7 * MAX_BLOCKS, 20)
    assert join_rows([narrow], [wide]) is None


@given(st.integers(1, 40).flatmap(rows_of), st.data())
def test_a_cut_is_the_bytes_between(parts: list[Rows], data: st.DataObject) -> None:
    rows = parts[0]
    first = data.draw(st.integers(0, rows.nbytes))
    last = data.draw(st.integers(first, rows.nbytes))
    found = rows.cut(first, last)
    assert bytes_of(found) == offsets_of(rows)[first:last]
    assert len(found) <= 3
    assert max([rows.end, *(part.end for part in found)]) == rows.end == max(offsets_of(rows)) + 1


def test_a_slice_within_one_row_is_one_slice() -> None:
    assert slice_rows(10, 23, 27) == [(2, 1, 3, 4)]
    assert slice_rows(10, 20, 20) == []
