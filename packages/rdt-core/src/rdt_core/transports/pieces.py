"""Cutting the bytes of many views into objects of a bounded size, alike at both ends."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

View = TypeVar("View")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one view that lies in one object.

    Args:
        view: index of the view.
        view_offset: of the piece's first byte in the view.
        object_offset: of the piece's first byte in the object.
        nbytes: of the piece, more than 0.
    """

    view: int
    view_offset: int
    object_offset: int
    nbytes: int


def cut_into_objects(sizes: Sequence[int], max_object_nbytes: int) -> list[list[Piece]]:
    """The pieces of every object, when the views are laid end to end and cut at multiples of a size.

    Linear in the number of pieces. A view larger than an object is split; an empty one has no piece.

    Args:
        sizes: of the views, in bytes.
        max_object_nbytes: of each object but the last, which may be smaller; more than 0.
    """
    if max_object_nbytes < 1:
        raise ValueError(f"objects of {max_object_nbytes} bytes hold nothing")
    objects: list[list[Piece]] = []
    filled = max_object_nbytes
    for view, size in enumerate(sizes):
        done = 0
        while done < size:
            if filled == max_object_nbytes:
                objects.append([])
                filled = 0
            nbytes = min(size - done, max_object_nbytes - filled)
            objects[-1].append(Piece(view, done, filled, nbytes))
            done += nbytes
            filled += nbytes
    return objects


def split(views: Sequence[View], counts: Sequence[int]) -> list[Sequence[View]]:
    """The views in groups of these sizes, in order; all in one group when no size is given."""
    ends = [*itertools.accumulate(counts)] or [len(views)]
    return [views[start:end] for start, end in itertools.pairwise((0, *ends))]


def object_nbytes(pieces: Sequence[Piece]) -> int:
    """Size of one object of :func:`cut_into_objects`."""
    return pieces[-1].object_offset + pieces[-1].nbytes
