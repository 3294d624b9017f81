"""The CPU platform's layouts of weights, and how they are kept as the loader wrote them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rdt_vllm.compat.server import is_chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def allow_amx() -> None:
    """Ask the kernel for AMX in this process.

    A spawned worker lacks the permission and dies of SIGILL in its first bfloat16 attention
    (csrc/cpu attention kernels, 0.32).
    """
    import torch  # noqa: PLC0415

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def keep_plain_layouts() -> None:
    """Have the CPU platform keep weights as the loader wrote them, for models of ``rdt`` engines.

    Stock vLLM packs them away after a load, where no read can reach. Patches this process once.
    """
    from vllm.model_executor.layers import utils  # noqa: PLC0415
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts  # noqa: PLC0415

    if getattr(utils.dispatch_cpu_unquantized_gemm, "keeps_plain", False):
        return
    utils.dispatch_cpu_unquantized_gemm = _plain_gemm(utils.dispatch_cpu_unquantized_gemm)
    experts: Any = CPUUnquantizedExperts
    experts.process_weights_after_loading = _packing_aside(experts.process_weights_after_loading)
    experts.apply = _computing_on_packed(experts.apply)
    mla: Any = MLAAttention
    mla.process_weights_after_loading = _keeping_kv_b_proj(mla.process_weights_after_loading)


def _is_ours() -> bool:
    from vllm.config import get_current_vllm_config_or_none  # noqa: PLC0415

    return is_chosen(get_current_vllm_config_or_none())


def _plain_gemm(dispatch: Callable[..., None]) -> Callable[..., None]:
    """Matrix weights, embeddings and heads (model_executor/layers/utils.py, 0.32) stay plain parameters."""
    from torch.nn import functional  # noqa: PLC0415

    @functools.wraps(dispatch)
    def dispatch_plain(layer: Any, remove_weight: bool) -> None:  # noqa: FBT001  vLLM's signature
        if layer.weight.ndim != 2 or not _is_ours():  # noqa: PLR2004  a matrix
            dispatch(layer, remove_weight)
        else:
            layer.cpu_linear = functional.linear

    dispatch_plain.keeps_plain = True  # type: ignore[attr-defined]  # marks our wrapper
    return dispatch_plain


def _packing_aside(process: Callable[..., None]) -> Callable[..., None]:
    """Expert weights (fused_moe/experts/cpu_moe.py, 0.32) stay plain; the packed copy lies beside."""

    @functools.wraps(process)
    def pack_aside(self: Any, layer: Any) -> None:
        if not _is_ours() or _pads_bias(self, layer):
            process(self, layer)
            return
        plain = {name: getattr(layer, name) for name in ("w13_weight", "w2_weight")}
        try:
            process(self, layer)
            self.rdt_packed_w13, self.rdt_packed_w2 = layer.w13_weight.data, layer.w2_weight.data
        finally:
            for name, parameter in plain.items():
                setattr(layer, name, parameter)

    return pack_aside


def _computing_on_packed(apply: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(apply)
    def compute(self: Any, *, w1: Any, w2: Any, **kwargs: Any) -> None:
        w1, w2 = getattr(self, "rdt_packed_w13", w1), getattr(self, "rdt_packed_w2", w2)
        apply(self, w1=w1, w2=w2, **kwargs)

    return compute


def _pads_bias(experts: Any, layer: Any) -> bool:
    # The padded bias replaces the loader's in the parameter itself, so such a layer cannot stay plain.
    size = experts.moe_config.intermediate_size_per_partition
    return hasattr(layer, "w13_bias") and experts._padded_intermediate_size(experts.moe_config) != size


def repackable_experts(method: Any) -> Any | None:
    """The CPU experts of a MoE layer whose weights :func:`keep_plain_layouts` kept plain, else None."""
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return experts if hasattr(experts, "rdt_packed_w13") else None


def is_conv_packed(layer: torch.nn.Module) -> bool:
    """Whether a causal convolution's weight was packed in place (model_executor/layers/utils.py, 0.32)."""
    return hasattr(layer, "_cpu_unpacked_conv_weight")


def _keeping_kv_b_proj(process: Callable[..., None]) -> Callable[..., None]:
    """MLA's AMX kernels free ``kv_b_proj.weight`` after packing it (attention/mla_attention.py, 0.32)."""

    @functools.wraps(process)
    def derive(self: Any, act_dtype: torch.dtype) -> None:
        weight = self.kv_b_proj.weight
        process(self, act_dtype)
        if _is_ours():
            self.kv_b_proj.weight = weight

    return derive
