"""Exporters: what the ranks of a training framework hold, as regions of checkpoint tensors over live memory.

Nothing heavy is imported here; an exporter's framework is imported when its function is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdt_megatron.adapters import adapter_shards
    from rdt_megatron.fsdp import fsdp_shards
    from rdt_megatron.megatron import megatron_shards
    from rdt_megatron.merged import merged_shards

__version__ = "0.1.0"

_LAZY = {
    "adapter_shards": "rdt_megatron.adapters",
    "fsdp_shards": "rdt_megatron.fsdp",
    "megatron_shards": "rdt_megatron.megatron",
    "merged_shards": "rdt_megatron.merged",
}

__all__ = ["__version__", "adapter_shards", "fsdp_shards", "megatron_shards", "merged_shards"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
