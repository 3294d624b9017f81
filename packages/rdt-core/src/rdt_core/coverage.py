"""Whether regions are disjoint, and whether they cover a region: exact answers, with a witness.

Sizes that add up prove coverage only when the pieces are disjoint, since an overlap and a gap of one size
cancel out. The planner asks :func:`find_overlap` once a tensor and compares sizes afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def find_overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Indices of two regions that share an element, or None when all are disjoint. Empty regions never do.

    Sorts and splits along one dim after the other, so that rows, columns, grids and nested grids take
    O(n log n); only arrangements that no straight cut separates are compared pair by pair.
    """
    if len(regions) <= 1:
        return None
    todo = [[index for index, region in enumerate(regions) if region.num_elements]]
    while todo:
        group = todo.pop()
        if len(group) <= 1:
            continue
        parts = _separate(regions, group)
        if len(parts) > 1:
            todo.extend(parts)
            continue
        found = _sweep(regions, group)
        if found is not None:
            return found
    return None


def find_uncovered(region: Region, pieces: Sequence[Region]) -> Region | None:
    """A box of ``region`` that no piece touches, or None when every element is covered.

    Pieces may overlap and reach outside. Of several gaps the one returned depends on nothing but the
    set of pieces.
    """
    inside = {part for piece in pieces if (part := region.intersect(piece)) is not None}
    todo = [(region, sorted(inside, key=lambda part: part.start))]
    while todo:
        box, parts = todo.pop()
        if not box.num_elements:
            continue
        if not parts:
            return box
        todo.extend(
            (rest, [cut for part in parts if (cut := rest.intersect(part)) is not None])
            for rest in reversed(list(_subtract(box, parts[len(parts) // 2])))
        )
    return None


def count_union(regions: Sequence[Region]) -> int:
    """Number of elements held by at least one region, each counted once."""
    distinct = [region for region in dict.fromkeys(regions) if region.num_elements]
    if find_overlap(distinct) is None:
        return sum(region.num_elements for region in distinct)
    disjoint: list[Region] = []
    for region in distinct:
        fresh = [region]
        for held in disjoint:
            fresh = [rest for box in fresh for rest in _subtract_meeting(box, held)]
        disjoint.extend(fresh)
    return sum(region.num_elements for region in disjoint)


def widest_axis(regions: Sequence[Region]) -> int | None:
    """The dim along which the regions start at the most places; None for zero-dimensional or no regions."""
    if not regions or not regions[0].start:
        return None
    return max(range(len(regions[0].start)), key=lambda dim: len({region.start[dim] for region in regions}))


def _separate(regions: Sequence[Region], group: list[int]) -> list[list[int]]:
    """Split a group where a straight cut along some dim passes between its regions."""
    for dim in range(len(regions[group[0]].start)):
        order = sorted(group, key=lambda index: regions[index].start[dim])
        parts: list[list[int]] = []
        reach = -1
        for index in order:
            if regions[index].start[dim] >= reach:
                parts.append([])
            parts[-1].append(index)
            reach = max(reach, regions[index].stop[dim])
        if len(parts) > 1:
            return parts
    return [group]


def _sweep(regions: Sequence[Region], group: list[int]) -> tuple[int, int] | None:
    """Compare regions whose intervals meet along the widest axis."""
    axis = widest_axis([regions[index] for index in group])
    if axis is None:
        return group[0], group[1]
    active: list[int] = []
    for index in sorted(group, key=lambda index: regions[index].start[axis]):
        region = regions[index]
        active = [held for held in active if regions[held].stop[axis] > region.start[axis]]
        for held in active:
            if regions[held].intersect(region) is not None:
                return held, index
        active.append(index)
    return None


def _subtract_meeting(box: Region, taken: Region) -> Iterator[Region]:
    part = box.intersect(taken)
    return iter((box,)) if part is None else _subtract(box, part)


def _subtract(box: Region, part: Region) -> Iterator[Region]:
    """Disjoint boxes, possibly empty, that make up ``box`` without ``part``, which lies inside of it."""
    start, stop = list(box.start), list(box.stop)
    for dim, (first, last) in enumerate(zip(part.start, part.stop, strict=True)):
        yield Region(tuple(start), (*stop[:dim], first, *stop[dim + 1 :]))
        yield Region((*start[:dim], last, *start[dim + 1 :]), tuple(stop))
        start[dim], stop[dim] = first, last
