"""Every difference between vLLM versions and platforms that this adapter knows, and nothing else does.

Each item names the vLLM file and version it mirrors. Layout changes decide at call time whether this worker's
backend is ``rdt``; without it they do what vLLM does.
"""

from __future__ import annotations

from rdt_vllm.compat.core import (
    abort_requests,
    call_workers,
    dead_engine_error,
    drop_caches,
    flip_in_core,
    flips_in_core,
    hold,
    label_outputs,
    let_go,
    num_api_processes,
    offer_flip,
)
from rdt_vllm.compat.layouts import (
    is_conv_packed,
    repackable_experts,
)
from rdt_vllm.compat.server import (
    BACKEND,
    api_keys,
    exclude,
    find_option,
    is_chosen,
    offer_backend,
    update_router,
    vllm_version,
)
from rdt_vllm.compat.worker import watch_workers

__all__ = [
    "BACKEND",
    "abort_requests",
    "api_keys",
    "call_workers",
    "dead_engine_error",
    "drop_caches",
    "exclude",
    "find_option",
    "flip_in_core",
    "flips_in_core",
    "hold",
    "is_chosen",
    "is_conv_packed",
    "label_outputs",
    "let_go",
    "num_api_processes",
    "offer_backend",
    "offer_flip",
    "repackable_experts",
    "update_router",
    "vllm_version",
    "watch_workers",
]
