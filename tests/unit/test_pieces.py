from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.transports.pieces import cut_into_objects, object_nbytes


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30))
def test_pieces_cover_every_view_once_and_objects_are_full(sizes: list[int], limit: int) -> None:
    objects = cut_into_objects(sizes, limit)
    assert sum(map(object_nbytes, objects)) == sum(sizes)
    assert all(object_nbytes(pieces) == limit for pieces in objects[:-1])
    for pieces in objects:
        ends = [0, *(piece.object_offset + piece.nbytes for piece in pieces)]
        assert [piece.object_offset for piece in pieces] == ends[:-1]
    for view, size in enumerate(sizes):
        held = [piece for pieces in objects for piece in pieces if piece.view == view]
        ends = [0, *(piece.view_offset + piece.nbytes for piece in held)]
        assert [piece.view_offset for piece in held] == ends[:-1]
        assert ends[-1] == size


def test_a_view_beyond_32_bits_is_cut_and_its_offsets_are_whole() -> None:
    objects = cut_into_objects([3, 5 * 2**30], 2**30)
    assert len(objects) == 6
    assert objects[-1][-1].view_offset + objects[-1][-1].nbytes == 5 * 2**30
    assert max(object_nbytes(pieces) for pieces in objects) == 2**30


def test_objects_of_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="hold nothing"):
        cut_into_objects([1], 0)
