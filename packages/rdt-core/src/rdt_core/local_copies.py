"""Copies into tensors of one device, made ready at connect and run at every version."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from rdt_core.batched_copy import copy_all
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
        plain = [pair for pair in pairs if self._device.type == "cuda" and _is_plain(*pair)]
        self._fused = _fuse(plain, self._device) if plain else None
        self._across = [pair for pair in pairs if not _is_on_one_device(*pair)]
        here = [pair for pair in pairs if _is_on_one_device(*pair)]
        self._others = [pair for pair in here if self._fused is None or not _is_plain(*pair)]

    def run(self) -> None:
        """Copy everything, converting dtypes. Blocks until the device has done it, in the caller's stream."""
        if not self._pairs:
            return
        if self._fused is not None:
            self._fused.launch(torch.cuda.current_stream(self._device))
        copy_all(self._others)
        for target, source in self._across:
            target.copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _is_on_one_device(target: torch.Tensor, source: torch.Tensor) -> bool:
    return target.device == source.device


def _is_plain(target: torch.Tensor, source: torch.Tensor) -> bool:
    is_alike = target.dtype == source.dtype and _is_on_one_device(target, source)
    return is_alike and target.is_contiguous() and source.is_contiguous()


def _fuse(pairs: Sequence[_Pair], device: torch.device) -> FusedCopy | None:
    try:
        return FusedCopy(
            [(s.data_ptr(), t.data_ptr(), t.numel() * t.element_size()) for t, s in pairs], device
        )
    except (OSError, CudaDriverError) as error:
        logger.warning("commits copy tensor by tensor, which takes a third longer: %s", error)
        return None
