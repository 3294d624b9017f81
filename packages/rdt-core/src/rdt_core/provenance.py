"""Where the elements of a storage come from, while an engine's loader handles placeholders.

A view keeps its storage, so only a *new* storage needs a record: what it was copied from. Records are
immutable and point at each other; a placeholder that is written to gets another record, and what was copied
from it before keeps the old one. A record whose values are not moved but computed is :class:`Computed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from rdt_core.dtypes import is_convertible
from rdt_core.strided import (
    Axis,
    Pairing,
    TooManyBoxesError,
    cut_into_boxes,
    find_pairings,
    row_major_steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_PIECES = 65536
"""Boxes that one tensor may be cut into. Beyond it the loader's own code is the faster way."""

MAX_NUMBERED = 1 << 27
"""Elements that may be numbered one by one, at 8 bytes each."""

UNDEFINED = -1


@dataclass(frozen=True, slots=True)
class Named:
    """A checkpoint tensor: element ``i`` of the storage is element ``i`` of the row-major tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is ``value``, already rounded to ``dtype``."""

    value: float
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that no read brings: made from ``names`` by ``operation``, or by nothing known."""

    names: frozenset[str]
    operation: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of a storage with a known origin; offset and steps in elements."""

    origin: Origin
    offset: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """A contiguous array of ``shape`` made of copied views, one after the other along ``dim``.

    Args:
        casts: element types that the values went through on their way from the checkpoint.
    """

    shape: tuple[int, ...]
    dim: int
    parts: tuple[View, ...]
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]


@dataclass(frozen=True, slots=True)
class Numbered:
    """A storage whose every element has a number of its own in a :class:`Numbering`."""

    numbers: torch.Tensor
    numbering: Numbering
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]


Origin = Named | Constant | Computed | Joined | Numbered


class Leaf(NamedTuple):
    """Elements that come from one checkpoint tensor or one constant; source steps count its elements."""

    origin: Named | Constant
    pairing: Pairing


@dataclass(slots=True)
class Numbering:
    """Numbers for all elements of all checkpoint tensors, and below zero for constants."""

    tensors: list[Named] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    bases: list[int] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    end: int = 0

    def add(self, tensor: Named) -> None:
        """Number a tensor's elements from the current end on."""
        self.index[tensor.name] = len(self.tensors)
        self.tensors.append(tensor)
        self.bases.append(self.end)
        self.end += math.prod(tensor.shape)

    def constant(self, constant: Constant) -> int:
        """The number that stands for a constant."""
        if constant not in self.constants:
            self.constants.append(constant)
        return UNDEFINED - 1 - self.constants.index(constant)

    def of(self, origin: Origin, elements: torch.Tensor) -> torch.Tensor:
        """The numbers of a storage's elements, given by their offsets."""
        if isinstance(origin, Named):
            return elements + self.bases[self.index[origin.name]]
        if isinstance(origin, Numbered):
            return origin.numbers[elements]
        if isinstance(origin, Joined):
            return self._of_joined(origin, elements)
        number = self.constant(origin) if isinstance(origin, Constant) else UNDEFINED
        return torch.full_like(elements, number)

    def _of_joined(self, origin: Joined, elements: torch.Tensor) -> torch.Tensor:
        if not origin.shape:
            return self.of(origin.parts[0].origin, torch.full_like(elements, origin.parts[0].offset))
        steps = row_major_steps(origin.shape)
        at = [elements // step % size for step, size in zip(steps, origin.shape, strict=True)]
        numbers = torch.full_like(elements, UNDEFINED)
        first = 0
        for part in origin.parts:
            stop = first + part.shape[origin.dim]
            mine = (at[origin.dim] >= first) & (at[origin.dim] < stop)
            offsets = torch.full_like(elements[mine], part.offset)
            for dim, step in enumerate(part.steps):
                offsets += (at[dim][mine] - (first if dim == origin.dim else 0)) * step
            numbers[mine] = self.of(part.origin, offsets)
            first = stop
        return numbers

    def leaves(self, numbers: torch.Tensor, targets: torch.Tensor) -> Iterator[Leaf]:
        """The pairs (number, target byte) as few leaves.

        Raises:
            TooManyBoxesError: the pairs are too ragged.
            UndefinedError: an element was never written.
        """
        for number in torch.unique(numbers[numbers < 0]).tolist():
            if number == UNDEFINED:
                raise UndefinedError
            chosen = targets[numbers == number]
            for pairing in find_pairings(chosen, chosen, limit=MAX_PIECES):
                yield Leaf(self.constants[UNDEFINED - 1 - number], pairing)
        if not self.tensors:
            return
        owners = torch.searchsorted(torch.tensor(self.bases), numbers, right=True) - 1
        for owner in torch.unique(owners[numbers >= 0]).tolist():
            tensor, mine = self.tensors[owner], owners == owner
            for pairing in find_pairings(numbers[mine] - self.bases[owner], targets[mine], limit=MAX_PIECES):
                yield Leaf(tensor, pairing)


class UndefinedError(Exception):
    """A loader copies memory that it never wrote."""


def names_of(origin: Origin) -> frozenset[str]:
    """The checkpoint tensors that a storage's values come from."""
    if isinstance(origin, Named):
        return frozenset((origin.name,))
    if isinstance(origin, Computed):
        return origin.names
    if isinstance(origin, Joined):
        return frozenset().union(*(names_of(part.origin) for part in origin.parts))
    if isinstance(origin, Numbered):
        return _names_of_numbers(origin)
    return frozenset()


def _names_of_numbers(origin: Numbered) -> frozenset[str]:
    bases = torch.tensor(origin.numbering.bases)
    found = torch.searchsorted(bases, origin.numbers[origin.numbers >= 0], right=True) - 1
    return frozenset(origin.numbering.tensors[index].name for index in torch.unique(found).tolist())


def casts_of(origin: Origin) -> tuple[torch.dtype, ...]:
    """Element types that the values went through since they left the checkpoint."""
    return origin.casts if isinstance(origin, Joined | Numbered) else ()


def join_casts(parts: Sequence[Origin], dtype: torch.dtype) -> tuple[torch.dtype, ...] | None:
    """The casts of a storage of ``dtype`` copied from ``parts``; None when the parts' differ.

    Constants are already rounded to their own type; beside other parts they do not count.
    """
    if all(isinstance(part, Constant) for part in parts):
        return (dtype,) if any(part.dtype != dtype for part in parts) else ()
    found = {
        (*casts_of(part), dtype) if part.dtype != dtype else casts_of(part)
        for part in parts
        if not isinstance(part, Constant)
    }
    return found.pop() if len(found) == 1 else None


def trace(numbering: Numbering, origin: Origin, pairing: Pairing) -> Iterator[Leaf]:
    """Follow a copy out of a storage back to checkpoint tensors and constants.

    Raises:
        TooManyBoxesError: it takes too many pieces.
        UndefinedError: an element was never written.
    """
    if isinstance(origin, Named | Constant):
        yield Leaf(origin, pairing)
    elif isinstance(origin, Joined):
        for box in cut_into_boxes(pairing, origin.shape, limit=MAX_PIECES):
            yield from _trace_box(numbering, origin, box.start, box.shape, box.target, box.target_steps)
    elif isinstance(origin, Numbered):
        sources, targets = list_pairs(pairing)
        yield from numbering.leaves(origin.numbers[sources], targets)
    else:
        raise UndefinedError


def _trace_box(
    numbering: Numbering,
    origin: Joined,
    start: tuple[int, ...],
    shape: tuple[int, ...],
    target: int,
    target_steps: tuple[int, ...],
) -> Iterator[Leaf]:
    """Hand each part of a joined array its share of a box."""
    if not start:
        yield from trace(numbering, origin.parts[0].origin, Pairing(origin.parts[0].offset, target, ()))
        return
    dim, first = origin.dim, 0
    for part in origin.parts:
        low, high = max(start[dim], first), min(start[dim] + shape[dim], first + part.shape[dim])
        if low < high:
            at = (*start[:dim], low - first, *start[dim + 1 :])
            counts = (*shape[:dim], high - low, *shape[dim + 1 :])
            axes = tuple(map(Axis, counts, part.steps, target_steps))
            source = part.offset + sum(i * step for i, step in zip(at, part.steps, strict=True))
            moved = target + (low - start[dim]) * target_steps[dim]
            yield from trace(numbering, part.origin, Pairing(source, moved, axes))
        first += part.shape[dim]


def list_pairs(pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """Every source element and target byte of a pairing, in one order.

    Raises:
        TooManyBoxesError: more than ``MAX_NUMBERED`` pairs.
    """
    if pairing.num_pairs > MAX_NUMBERED:
        raise TooManyBoxesError
    sources, targets = torch.tensor([pairing.source]), torch.tensor([pairing.target])
    for axis in pairing.axes:
        count = torch.arange(axis.length)
        sources = (sources[:, None] + count * axis.source_step).flatten()
        targets = (targets[:, None] + count * axis.target_step).flatten()
    return sources, targets


def is_one_rounding(source: torch.dtype, casts: Sequence[torch.dtype], target: torch.dtype) -> bool:
    """Whether a copy from ``source`` to ``target`` gives the same bytes as one through ``casts``.

    Widening on the way changes no value. One rounding, to the target's own type, is what landing does too;
    any other is lost, or rounded twice.
    """
    held, roundings = source, []
    for dtype in (*casts, target):
        if not _holds_all(dtype, held):
            roundings.append(dtype)
            held = dtype
    names = (str(dtype).removeprefix("torch.") for dtype in (source, target))
    return roundings in ([], [target]) and is_convertible(*names)


def _holds_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``."""
    if wide == narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    wide_info, narrow_info = torch.finfo(wide), torch.finfo(narrow)
    return (
        wide_info.eps <= narrow_info.eps
        and wide_info.max >= narrow_info.max
        and wide_info.smallest_normal * wide_info.eps <= narrow_info.smallest_normal * narrow_info.eps
    )
