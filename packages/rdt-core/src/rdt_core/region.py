"""Boxes in a tensor's index space."""

from __future__ import annotations

import functools
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

    @staticmethod
    def whole(shape: Sequence[int]) -> Region:
        """The region that holds every element of a tensor of ``shape``; one object for equal shapes."""
        return _whole(tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in each dim, in elements."""
        return tuple(map(operator.sub, self.stop, self.start))

    @property
    def num_elements(self) -> int:
        """How many elements the box holds; 1 for a zero-dimensional tensor."""
        return math.prod(map(operator.sub, self.stop, self.start))

    def intersect(self, other: Region) -> Region | None:
        """The region held by both, or None when they do not meet."""
        if len(self.start) != len(other.start):
            raise ValueError(f"{self} and {other} differ in length")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(map(operator.ge, start, stop)):
            return None
        # Mostly one region holds the other, and records are shared rather than made anew.
        if start == self.start and stop == self.stop:
            return self
        return Region(start, stop)

    def contains(self, other: Region) -> bool:
        """Whether every element of ``other`` lies in this region."""
        if len(self.start) != len(other.start):
            raise ValueError(f"{self} and {other} differ in length")
        return all(map(operator.le, self.start, other.start)) and all(map(operator.le, other.stop, self.stop))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@functools.lru_cache(maxsize=4096)
def _whole(shape: tuple[int, ...]) -> Region:
    """Made once: a model of very many tensors has few shapes."""
    return Region((0,) * len(shape), shape)
