"""Many copies between tensors of one device at once, converting dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy every (target, source), converting dtypes. On CUDA the copies are queued, not awaited."""
    if not pairs:
        return
    with torch.no_grad():
        if pairs[0][0].device.type == "cpu":
            # On CPU the foreach form falls back to something 30 times slower than tensor by tensor.
            for target, source in pairs:
                target.copy_(source)
        else:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
