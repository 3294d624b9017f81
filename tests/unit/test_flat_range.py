"""A run of elements of a tensor, cut into boxes: exactly those elements, in order, and few boxes."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from rdt_megatron.flat_range import boxes_of_range


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_boxes_hold_the_range_in_order_and_are_few(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    numbers = {at: n for n, at in enumerate(itertools.product(*map(range, shape)))}
    found: list[int] = []
    boxes = list(boxes_of_range(shape, start, stop))
    for first, box in boxes:
        inside = itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True)))
        elements = [numbers[at] for at in inside]
        assert elements == list(range(first, first + len(elements)))
        found += elements
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
