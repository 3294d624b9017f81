"""A run of elements of a row-major tensor, as boxes: what a rank of a flat sharding holds of a parameter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterator


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Region]]:
    """The boxes that hold elements ``[start, stop)``, each with the number of its first element.

    In order and disjoint; every box is contiguous. Three at most for a matrix (the rest of a row, whole rows,
    the beginning of a row), two more for every further dim.

    Args:
        shape: of the tensor, in elements.
        start: first element, in row-major order.
        stop: behind the last.
    """
    if start >= stop:
        return
    if not shape:
        yield start, Region((), ())
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last and stop - start < inner:
        for at, box in boxes_of_range(shape[1:], start - first * inner, stop - first * inner):
            yield first * inner + at, Region((first, *box.start), (first + 1, *box.stop))
        return
    full_from, full_to = -(-start // inner), stop // inner
    yield from boxes_of_range(shape, start, min(full_from * inner, stop))
    if full_from < full_to:
        begin = (0,) * (len(shape) - 1)
        yield full_from * inner, Region((full_from, *begin), (full_to, *shape[1:]))
    yield from boxes_of_range(shape, max(full_to * inner, start), stop)
