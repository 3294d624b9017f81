"""Refuses memory of a trainer that engines could not read as it lies."""

from __future__ import annotations

import torch
from torch import nn

from rdt_core.errors import UnsupportedLayoutError

_EXPORTED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_readable(local: torch.Tensor, name: str, rank: int, device: torch.device | None = None) -> None:
    """Called for every parameter that an exporter describes.

    Args:
        local: what this rank holds of the parameter.
        name: of the parameter in the bare model.
        rank: global trainer rank.
        device: where the rank's other parameters are; None for the first.

    Raises:
        UnsupportedLayoutError: it is quantized, on no device or another one, or its memory was released.
    """
    if type(local) not in (torch.Tensor, nn.Parameter) or local.dtype not in _EXPORTED_DTYPES:
        reason = f"its payload is a {type(local).__name__} of {local.dtype}"
        remedy = (
            "Quantized and fp8 parameters are not exported, since their bytes mean nothing without scales: "
            "train in float16, bfloat16 or float32."
        )
    elif local.is_meta:
        reason = "it is on the meta device and has no memory"
        remedy = "Materialize the model (to_empty and load, or init_weights) before attaching."
    elif device is not None and local.device != device:
        reason = f"it is on {local.device}, and others are on {device}"
        remedy = "Attach when every parameter is on the training device, and train without offloading them."
    elif local.numel() and not local.untyped_storage().nbytes():
        reason = "its memory has been released"
        remedy = "Reload offloaded parameters before attaching."
    else:
        return
    raise UnsupportedLayoutError(name, rank, reason, remedy)
