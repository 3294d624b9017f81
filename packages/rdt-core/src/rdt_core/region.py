"""Boxes in a tensor's index space."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open box ``[start, stop)`` of a tensor. Global coordinates, in elements, never bytes.

    A zero-dimensional tensor has one region, ``Region((), ())``, which holds its one element.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start {self.start} and stop {self.stop} differ in length")
        if any(map(operator.gt, self.start, self.stop)) or min(self.start, default=0) < 0:
            raise ValueError(f"need 0 <= start <= stop in every dim, got {self.start} and {self.stop}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """The region that holds every element of a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in each dim, in elements."""
        return tuple(map(operator.sub, self.stop, self.start))

    @property
    def num_elements(self) -> int:
        """How many elements the box holds; 1 for a zero-dimensional tensor."""
        return math.prod(self.shape)

    def intersect(self, other: Region) -> Region | None:
        """The region held by both, or None when they do not meet."""
        if len(self.start) != len(other.start):
            raise ValueError(f"{self} and {other} differ in length")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(map(operator.ge, start, stop)):
            return None
        return Region(start, stop)

    def contains(self, other: Region) -> bool:
        """Whether every element of ``other`` lies in this region."""
        return all(
            a <= c and d <= b
            for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"
