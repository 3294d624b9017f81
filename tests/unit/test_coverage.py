from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.coverage import count_union, find_overlap, find_uncovered
from rdt_core.region import Region
from tests.unit.oracle import coordinates
from tests.unit.strategies import regions_within, splits

if TYPE_CHECKING:
    from random import Random

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
many_regions = shapes.flatmap(lambda shape: st.lists(regions_within(shape), max_size=6))
shape_and_regions = shapes.flatmap(
    lambda shape: st.tuples(st.just(shape), st.lists(regions_within(shape), max_size=6))
)


ShapeAndRegions: TypeAlias = tuple[tuple[int, ...], list[Region]]


def elements(regions: list[Region]) -> set[tuple[int, ...]]:
    return set(itertools.chain.from_iterable(map(coordinates, regions)))


@given(many_regions)
def test_an_overlap_is_found_exactly_when_there_is_one(regions: list[Region]) -> None:
    overlapping = {
        (one, other)
        for one, other in itertools.combinations(range(len(regions)), 2)
        if set(coordinates(regions[one])) & set(coordinates(regions[other]))
    }
    found = find_overlap(regions)
    assert (found is None) == (not overlapping)
    assert found is None or tuple(sorted(found)) in overlapping


@given(shape_and_regions)
def test_what_is_uncovered_is_truly_missing_and_nothing_missing_is_overlooked(case: ShapeAndRegions) -> None:
    shape, pieces = case
    whole = Region.whole(shape)
    missing = set(coordinates(whole)) - elements(pieces)
    found = find_uncovered(whole, pieces)
    assert (found is None) == (not missing)
    assert found is None or (found.num_elements > 0 and set(coordinates(found)) <= missing)


@given(shape_and_regions, st.randoms(use_true_random=False))
def test_the_gap_that_is_named_depends_on_the_set_of_pieces_only(
    case: ShapeAndRegions, random: Random
) -> None:
    shape, pieces = case
    shuffled = [*pieces, *pieces[:1]]
    random.shuffle(shuffled)
    assert find_uncovered(Region.whole(shape), shuffled) == find_uncovered(Region.whole(shape), pieces)


@given(many_regions)
def test_a_union_counts_every_element_once(regions: list[Region]) -> None:
    assert count_union(regions) == len(elements(regions))


@given(shapes.flatmap(lambda shape: splits(Region.whole(shape))))
def test_a_split_region_is_covered_without_overlap(parts: list[Region]) -> None:
    assert find_overlap(parts) is None


def test_an_overlap_and_a_gap_of_one_size_do_not_cancel_out() -> None:
    pieces = [Region((0,), (4,)), Region((2,), (6,))]
    assert sum(piece.num_elements for piece in pieces) == 8
    assert find_overlap(pieces) == (0, 1)
    assert find_uncovered(Region((0,), (8,)), pieces) == Region((6,), (8,))


def test_a_pinwheel_that_no_straight_cut_separates_is_disjoint_with_a_hole_in_the_middle() -> None:
    pinwheel = [
        Region((0, 0), (1, 2)),
        Region((0, 2), (2, 3)),
        Region((2, 1), (3, 3)),
        Region((1, 0), (3, 1)),
    ]
    assert find_overlap(pinwheel) is None
    assert find_uncovered(Region((0, 0), (3, 3)), pinwheel) == Region((1, 1), (2, 2))


def test_a_long_region_is_compared_with_all_that_start_beside_it() -> None:
    regions = [Region((0, 0), (10, 1)), Region((1, 5), (2, 6)), Region((3, 0), (4, 1))]
    assert sorted(find_overlap(regions) or ()) == [0, 2]


def test_two_zero_dimensional_regions_overlap() -> None:
    assert find_overlap([Region((), ()), Region((), ())]) is not None
    assert find_uncovered(Region((), ()), []) == Region((), ())


@pytest.mark.parametrize("shape", [(10_000, 1), (1, 10_000), (100, 100)])
def test_ten_thousand_regions_in_rows_columns_or_a_grid_are_checked_without_comparing_all_pairs(
    shape: tuple[int, int],
) -> None:
    grid = [Region((2 * i, 3 * j), (2 * i + 2, 3 * j + 3)) for i in range(shape[0]) for j in range(shape[1])]
    began = time.process_time()
    assert find_overlap(grid) is None
    gap = grid.pop(len(grid) // 3)
    assert find_uncovered(Region((0, 0), (2 * shape[0], 3 * shape[1])), grid) == gap
    # Comparing 50 million pairs takes minutes of CPU time; this takes well under a second.
    assert time.process_time() - began < 20.0
