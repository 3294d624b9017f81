"""The arenas of one trainer rank: who asked for what, where it lies, and its refresh at every publish."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rdt_core.arena import place_items
from rdt_core.describe import typed_view
from rdt_core.dtypes import itemsize_bytes
from rdt_core.errors import ArenaMemoryError, WireFormatError
from rdt_core.layout import row_major_strides, span_nbytes
from rdt_core.local_copies import LocalCopies

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rdt_core.arena import ArenaItem


@dataclass(slots=True)
class _Slot:
    """Where one item lies, and for how many readers.

    Args:
        buffer: keeps the memory; shared by the items that were laid out together.
        offset_bytes: in the buffer.
        target: the item in the buffer.
        source: the box in the parameter's live memory.
    """

    buffer: torch.Tensor
    offset_bytes: int
    target: torch.Tensor
    source: torch.Tensor
    num_holds: int = 0


class Arenas:
    """Packed and narrowed copies of live memory, for readers that would pay more without.

    An item that several readers need is held once. Items of one request that are new lie side by side in one
    buffer, which goes when the last of them does. Methods may be called from any thread.

    Args:
        windows: flat uint8 views of the live storages by name.
    """

    def __init__(self, windows: Mapping[str, torch.Tensor]) -> None:
        self._windows = windows
        self._slots: dict[ArenaItem, _Slot] = {}
        self._copies: LocalCopies | None = None
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory held beside the parameters; 0 when no reader needs an arena."""
        return self._nbytes

    def hold(self, items: Sequence[ArenaItem]) -> ArenaHold:
        """Lay different items out for one reader, filled from the live memory as it is now.

        Called from the publisher's service thread. Blocks for the copy, and a publish meanwhile waits.

        Raises:
            WireFormatError: an item reaches out of its window.
            ArenaMemoryError: there is no memory for them.
        """
        with self._lock:
            fresh = self._lay_out([item for item in items if item not in self._slots])
            _copies_of(fresh.values()).run()
            self._slots |= fresh
            if fresh:
                # Made here and not by the next publish, which the trainer waits for.
                self._copies = _copies_of(self._slots.values())
                self._count()
            slots = [self._slots[item] for item in items]
            for slot in slots:
                slot.num_holds += 1
            return ArenaHold(self, tuple(items), slots)

    def drop(self, items: Sequence[ArenaItem]) -> None:
        """Take one hold off every item. Called by :class:`ArenaHold` only."""
        with self._lock:
            for item in items:
                slot = self._slots[item]
                slot.num_holds -= 1
                if not slot.num_holds:
                    del self._slots[item]
                    self._copies = None
            self._count()

    def _count(self) -> None:
        buffers = {id(slot.buffer): slot.buffer.numel() for slot in self._slots.values()}
        self._nbytes = sum(buffers.values())

    def refresh(self) -> None:
        """Copy every item from live memory anew, and wait for the device.

        Called by ``publish``, after the readers of the last version have been turned away.

        Raises:
            RdtError: the device refused; what the arenas hold is of no version.
        """
        with self._lock:
            if self._copies is None:
                self._copies = _copies_of(self._slots.values())
            self._copies.run()

    def _lay_out(self, items: Sequence[ArenaItem]) -> dict[ArenaItem, _Slot]:
        if not items:
            return {}
        for item in items:
            self._check(item)
        offsets, nbytes = place_items(items)
        device = self._windows[items[0].window].device
        try:
            # Zeroed, so that the gaps between items show no other memory to the reader.
            buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise ArenaMemoryError(nbytes, str(device)) from error
        return {
            item: _Slot(buffer, offset, _in_buffer(buffer, item, offset), self._in_window(item))
            for item, offset in zip(items, offsets, strict=True)
        }

    def _check(self, item: ArenaItem) -> None:
        window = self._windows.get(item.window)
        if window is None or not _lies_within(item, window.numel()):
            raise WireFormatError("a request for an arena", f"{item} does not lie in this rank's memory")

    def _in_window(self, item: ArenaItem) -> torch.Tensor:
        window = self._windows[item.window]
        return typed_view(window, item.source_dtype, item.shape, item.offset_bytes, item.stride_bytes)


class ArenaHold:
    """One reader's claim to its items, made by :meth:`Arenas.hold`. Its owner is the publisher's export."""

    def __init__(self, arenas: Arenas, items: tuple[ArenaItem, ...], slots: Sequence[_Slot]) -> None:
        self._arenas, self._items, self._slots = arenas, items, tuple(slots)
        self._offsets, _ = place_items(items)

    def view(self, offset_bytes: int, nbytes: int) -> torch.Tensor:
        """The flat bytes of one item, or a part of them, by their place in the reader's layout.

        Raises:
            WireFormatError: the range is not inside of one item.
        """
        index = bisect_right(self._offsets, offset_bytes) - 1
        inside = offset_bytes - self._offsets[index] if index >= 0 else 0
        if index < 0 or inside + nbytes > self._items[index].nbytes or nbytes < 0:
            reason = f"bytes {offset_bytes} to {offset_bytes + nbytes} are not inside of one item"
            raise WireFormatError("a request for an arena", reason)
        slot = self._slots[index]
        return slot.buffer[slot.offset_bytes + inside : slot.offset_bytes + inside + nbytes]

    def close(self) -> None:
        """Give the items up; memory that nobody else holds is freed. Idempotent."""
        items, self._items, self._slots = self._items, (), ()
        self._arenas.drop(items)


def _lies_within(item: ArenaItem, window_nbytes: int) -> bool:
    itemsize = itemsize_bytes(item.source_dtype)
    numbers = (item.offset_bytes, *item.stride_bytes, *item.shape)
    if len(item.shape) != len(item.stride_bytes) or min(numbers) < 0:
        return False
    if any(number % itemsize for number in (item.offset_bytes, *item.stride_bytes)):
        return False
    end = item.offset_bytes + span_nbytes(item.shape, item.stride_bytes, itemsize)
    # A stride of 0 would have a small window fill an arena of any size.
    return end <= window_nbytes and math.prod(item.shape) * itemsize <= window_nbytes


def _in_buffer(buffer: torch.Tensor, item: ArenaItem, offset_bytes: int) -> torch.Tensor:
    dense = row_major_strides(item.shape, itemsize_bytes(item.dtype))
    return typed_view(buffer, item.dtype, item.shape, offset_bytes, dense)


def _copies_of(slots: Iterable[_Slot]) -> LocalCopies:
    return LocalCopies([(slot.target, slot.source) for slot in slots])
