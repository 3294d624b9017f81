"""Puts live memory on huge pages, in place, so that another process reads it at the speed of a copy.

Reading another process's memory (``process_vm_readv``, below NIXL on one host) looks up and pins the source's
pages one by one: with 4 KiB pages that takes longer than the copying. The kernel can replace the pages under
memory that is in use by huge ones; addresses and contents stay.
"""

from __future__ import annotations

import ctypes
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 * 2**20
"""Of x86-64, and of 64-bit Arm with 4 KiB pages; elsewhere the kernel declines, which costs nothing."""

# Source: Linux, include/uapi/asm-generic/mman-common.h. MADV_COLLAPSE is there since Linux 6.1.
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25


def back_with_huge_pages(views: Sequence[torch.Tensor]) -> None:
    """Ask the kernel to move CPU memory onto huge pages. Called when memory is first offered to readers.

    Blocks for about as long as a copy of the memory. What the kernel declines stays as it was: an old kernel,
    huge pages switched off, a mapping too short for one. Memory on other devices is left alone.

    Args:
        views: contiguous tensors of live memory.
    """
    library = ctypes.CDLL(None, use_errno=True)
    for start, stop in _aligned_ranges(views):
        # Page by page: the kernel ends a call at the first page that it cannot move, and leaves the others.
        declined = sum(not _collapse(library, page) for page in range(start, stop, HUGE_PAGE_BYTES))
        if declined:
            logger.debug("%d of %d huge pages declined", declined, (stop - start) // HUGE_PAGE_BYTES)


def _collapse(library: ctypes.CDLL, page: int) -> bool:
    arguments = ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE_BYTES)
    # The first makes later faults huge where the system's policy is to wait for such a wish.
    library.madvise(*arguments, _MADV_HUGEPAGE)
    return bool(library.madvise(*arguments, _MADV_COLLAPSE) == 0)


def _aligned_ranges(views: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """The address ranges behind the views, widened to whole huge pages and joined where they meet.

    What lies beside a small tensor on the same huge page is this process's own memory as well.
    """
    spans = sorted(
        (view.data_ptr(), view.data_ptr() + view.numel() * view.element_size())
        for view in views
        if view.device.type == "cpu" and view.numel()
    )
    held: tuple[int, int] | None = None
    for first, last in spans:
        start = first // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        stop = -(-last // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if held is not None and start <= held[1]:
            held = (held[0], max(held[1], stop))
            continue
        if held is not None:
            yield held
        held = (start, stop)
    if held is not None:
        yield held
