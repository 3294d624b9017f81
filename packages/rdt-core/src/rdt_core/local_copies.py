"""Copies into tensors of one device, made ready once and run at every version: arenas and commits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from rdt_core.batched_copy import copy_all
from rdt_core.row_blocks import RowBlock, find_row_blocks
from rdt_core.transports.cuda_driver import CudaDriverError
from rdt_core.transports.fused_copy import FusedCopy

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

_Pair = tuple[torch.Tensor, torch.Tensor]


class LocalCopies:
    """Many copies at once. On CUDA whatever needs no conversion is one kernel launch.

    Args:
        pairs: (target, source) views, of any strides and dtypes; the targets are of one device, the sources
            of it or of the host. Kept alive.
    """

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self._pairs = tuple(pairs)
        self._device = pairs[0][0].device if pairs else torch.device("cpu")
        self._across = [pair for pair in pairs if not _is_on_one_device(*pair)]
        here = [pair for pair in pairs if _is_on_one_device(*pair)]
        blocks: list[RowBlock] = []
        self._others: list[_Pair] = []
        for pair in here:
            found = _row_blocks(*pair) if self._device.type == "cuda" else None
            blocks += found or ()
            self._others += [pair] if found is None else []
        self._fused = _fuse(blocks, self._device) if blocks else None
        if self._fused is None:
            self._others = here

    def run(self) -> None:
        """Copy everything, converting dtypes. Blocks until the device has done it, in the caller's stream."""
        if self._device.type == "cuda" and self._pairs:
            with torch.cuda.device(self._device):
                self._run()
                torch.cuda.current_stream(self._device).synchronize()
        else:
            self._run()

    def _run(self) -> None:
        if self._fused is not None:
            self._fused.launch(torch.cuda.current_stream(self._device))
        copy_all(self._others)
        for target, source in self._across:
            target.copy_(source, non_blocking=True)


def _is_on_one_device(target: torch.Tensor, source: torch.Tensor) -> bool:
    return target.device == source.device


def _row_blocks(target: torch.Tensor, source: torch.Tensor) -> list[RowBlock] | None:
    """A copy inside one device as rows at their addresses; None where it converts or transposes."""
    if target.dtype != source.dtype or target.shape != source.shape:
        return None
    itemsize = target.element_size()
    found = find_row_blocks(
        target.shape,
        [step * itemsize for step in source.stride()],
        [step * itemsize for step in target.stride()],
        itemsize,
    )
    if found is None:
        return None
    first, second = source.data_ptr(), target.data_ptr()
    return [block._replace(source=first + block.source, target=second + block.target) for block in found]


def _fuse(blocks: Sequence[RowBlock], device: torch.device) -> FusedCopy | None:
    try:
        return FusedCopy(blocks, device)
    except (OSError, CudaDriverError) as error:
        logger.warning("tensors are copied one by one, which takes a third longer and more: %s", error)
        return None
