from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.region import Region
from tests.unit.oracle import coordinates
from tests.unit.strategies import regions_within

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
pairs = shapes.flatmap(lambda shape: st.tuples(regions_within(shape), regions_within(shape)))


@given(pairs)
def test_an_intersection_holds_the_elements_of_both_and_none_when_there_are_none(
    pair: tuple[Region, Region],
) -> None:
    one, other = pair
    both = set(coordinates(one)) & set(coordinates(other))
    found = one.intersect(other)
    assert (set() if found is None else set(coordinates(found))) == both
    assert (found is None) == (not both)
    assert other.intersect(one) == found


@given(pairs)
def test_a_region_contains_what_it_meets_entirely(pair: tuple[Region, Region]) -> None:
    one, other = pair
    if other.num_elements:
        assert one.contains(other) == (one.intersect(other) == other)


@given(shapes)
def test_the_whole_region_of_a_shape_holds_every_element(shape: tuple[int, ...]) -> None:
    whole = Region.whole(shape)
    assert whole.shape == shape
    assert whole.num_elements == len(list(coordinates(whole)))


def test_a_zero_dimensional_region_holds_one_element() -> None:
    scalar = Region((), ())
    assert scalar.num_elements == 1
    assert scalar.intersect(scalar) == scalar
    assert str(scalar) == "[]"


def test_a_region_prints_like_a_slice() -> None:
    assert str(Region((0, 2), (4, 5))) == "[0:4, 2:5]"


@pytest.mark.parametrize(("start", "stop"), [((0,), (1, 2)), ((3,), (2,)), ((-1,), (2,)), ((0, -2), (1, -1))])
def test_bounds_that_are_no_box_are_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"start|stop"):
        Region(start, stop)


def test_regions_of_different_dims_do_not_intersect_silently() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Region((0,), (1,)).intersect(Region((0, 0), (1, 1)))
