"""Where the exporter touches what Megatron-core keeps to itself, each with its source.

Versions 0.16.1 and 0.19.2 agree in all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def settle_expert_bias(model: nn.Module) -> None:
    """Let every router make its float32 bias now, in the memory it keeps from its first forward on.

    Float16Module casts the buffer with everything else, and the router undoes that in every forward.

    Source: ``megatron/core/transformer/moe/router.py``, ``TopKRouter._maintain_float32_expert_bias``.
    """
    for module in model.modules():
        settle = getattr(module, "_maintain_float32_expert_bias", None)
        if settle is not None:
            settle()


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether a module's buffer belongs to its state. Source: ``torch.nn.Module.register_buffer``."""
    return buffer not in module._non_persistent_buffers_set


def sync_parameters(wrapped: Any) -> None:
    """Finish the parameter gather that ``overlap_param_gather`` has put off. A collective of the DP group.

    Source: ``megatron/core/distributed/distributed_data_parallel.py``, ``disable_forward_pre_hook``, which
    does the same before parameters are used outside of a forward.
    """
    wrapped.start_param_sync(force_sync=True)
