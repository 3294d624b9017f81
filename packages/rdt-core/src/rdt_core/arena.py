"""What an engine has a trainer rank lay out for it: boxes of tensors packed, and narrowed, side by side.

Every item is one contiguous range to read, whatever the box was. Both ends find it by :func:`place_items`.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.dtypes import itemsize_bytes
from rdt_core.errors import WireFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ARENA_WINDOW = "arena:"
"""The name of its arena in an engine rank's reads, which no parameter's name can be."""

ARENA_ALIGNMENT_BYTES = 16
"""Every item begins on a multiple of this, for vector loads on either side."""


@dataclass(frozen=True, slots=True)
class ArenaItem:
    """One box of a trainer's window, laid out row-major in ``dtype``. Equal items are one, for any reader.

    Args:
        window: of the trainer rank, whose live memory is copied.
        offset_bytes: of the box's first element in the window.
        shape: of the box, in elements.
        stride_bytes: of the box in the window, one a dim.
        source_dtype: element type in the window.
        dtype: element type in the arena.
    """

    window: str
    offset_bytes: int
    shape: tuple[int, ...]
    stride_bytes: tuple[int, ...]
    source_dtype: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in the arena."""
        return math.prod(self.shape) * itemsize_bytes(self.dtype)


def place_items(items: Sequence[ArenaItem]) -> tuple[list[int], int]:
    """Where each item begins in an arena that holds them in this order, and the arena's size, in bytes."""
    offsets, end = [], 0
    for item in items:
        end += -end % ARENA_ALIGNMENT_BYTES
        offsets.append(end)
        end += item.nbytes
    return offsets, end


def items_to_wire(items: Iterable[ArenaItem]) -> list[tuple[Any, ...]]:
    """Plain values for the coordinator to carry."""
    return [astuple(item) for item in items]


def items_from_wire(values: Sequence[Sequence[Any]]) -> tuple[ArenaItem, ...]:
    """The items that an engine rank asks for.

    Raises:
        WireFormatError: a value is not of its field's type.
    """
    try:
        return tuple(
            ArenaItem(str(window), int(offset), _ints(shape), _ints(strides), str(source), str(dtype))
            for window, offset, shape, strides, source, dtype in values
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise WireFormatError("a request for an arena", str(error)) from None


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
