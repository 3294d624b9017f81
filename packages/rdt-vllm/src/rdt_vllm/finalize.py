"""What vLLM derives from weights after a load, and how to derive it again after a commit.

vLLM runs two kinds of post-load hooks: ``quant_method.process_weights_after_loading(layer)`` of every layer
with weights, and ``module.process_weights_after_loading(dtype)`` of attention layers. Each is listed here by
the class that implements it. What is not listed might lay parameters out anew, so it is refused when an
engine connects, by the layer's name, and never run.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.derived import Hook, owner_of
from rdt_core.errors import UnsupportedLoaderError
from rdt_vllm import compat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"

# Hooks of layers with weights, by the class that implements them. True: derives tensors from weights, run
# again at every commit. False: leaves weights as they are, here or on CPU with plain layouts.
_LAYER_HOOKS = {
    f"{_LAYERS}.fused_moe.router.gate_linear._GateLinearMethod": True,
    f"{_LAYERS}.linear.UnquantizedLinearMethod": False,
    f"{_LAYERS}.vocab_parallel_embedding.UnquantizedEmbeddingMethod": False,
}

# Hooks of attention modules. False: reads no weight (it sets quantization scales of the KV cache).
_MODULE_HOOKS = {
    f"{_LAYERS}.attention.attention.Attention": False,
    f"{_LAYERS}.attention.mla_attention.MLAAttention": True,
    f"{_LAYERS}.attention.mm_encoder_attention.MMEncoderAttention": False,
}

# The same for attention backends, whose hook the module's own one calls.
_IMPL_HOOKS = {
    "vllm.v1.attention.backend.AttentionImplBase": False,
    "vllm.v1.attention.backends.b12x.B12xPagedAttentionImpl": True,
    "vllm.v1.attention.backends.flashinfer.FlashInferImpl": True,
    "vllm.v1.attention.backends.mla.amx_mla.AMXMLAImpl": True,
}

# Parameters that hooks add to their module: derived, so no tensor of a checkpoint fills them.
_DERIVED_PARAMETERS = ("W_K", "W_K_scale", "W_UK_T", "W_UK_T_dcp_qrep", "W_UV", "W_V", "W_V_scale")

# Kernels of unquantized experts that compute on the checkpoint's own layout.
_PLAIN_MOE_BACKENDS = frozenset({"TRITON", "BATCHED_TRITON"})


def find_hooks(model: torch.nn.Module, dtype: torch.dtype) -> tuple[Hook, ...]:
    """Every computation to repeat after weights change, in vLLM's own order: layers, then attention.

    Called at connect in each worker; runs nothing.

    Args:
        model: loaded and processed.
        dtype: the model's activation dtype, which attention hooks take.

    Raises:
        UnsupportedLoaderError: a layer's weights are not laid out as its loader writes them, or a hook is
            unknown.

    Source: vllm 0.32 model_executor/model_loader/utils.py, process_weights_after_loading.
    """
    modules = list(model.named_modules())
    # Some quantization methods are modules too, children of the layer that they serve.
    methods = {id(getattr(module, "quant_method", None)) for _, module in modules}
    others = [(name, module) for name, module in modules if id(module) not in methods]
    layers = [hook for name, module in modules for hook in _layer_hooks(name, module)]
    return (*layers, *(hook for name, module in others for hook in _module_hooks(name, module, dtype)))


@contextlib.contextmanager
def derived_hidden(hooks: Iterable[Hook]) -> Iterator[None]:
    """While the loader is recorded, take from the model the parameters that no loader fills."""
    taken = [
        (module, name, parameter)
        for hook in hooks
        if isinstance(module := hook.holders[0], torch.nn.Module)
        for name, parameter in list(module.named_parameters(recurse=False))
        if name in _DERIVED_PARAMETERS
    ]
    for module, name, _ in taken:
        delattr(module, name)
    try:
        yield
    finally:
        for module, name, parameter in taken:
            setattr(module, name, parameter)


def _layer_hooks(name: str, layer: torch.nn.Module) -> Iterator[Hook]:
    method: Any = getattr(layer, "quant_method", None)
    process = getattr(type(method), "process_weights_after_loading", None)
    if process is None:
        return
    owner = owner_of(process)
    if "process_weights_after_loading" in vars(method):
        raise UnsupportedLoaderError(name, f"a post-load hook of its own in place of {owner}'s")
    if owner in _LAYER_HOOKS:
        _check_plain(name, layer)
        if _LAYER_HOOKS[owner]:
            yield Hook(name, (layer,), lambda: method.process_weights_after_loading(layer))
    elif owner == _MOE:
        yield from _moe_hooks(name, layer, method)
    elif _has_weights(layer):
        raise UnsupportedLoaderError(name, f"{type(method).__name__}'s own weight layout (quantization)")


def _check_plain(name: str, layer: torch.nn.Module) -> None:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.numel() == 0:
        raise UnsupportedLoaderError(name, "packing that drops the weight (start with --weight-sync rdt)")
    if compat.is_conv_packed(layer):
        raise UnsupportedLoaderError(name, "packing of a causal convolution for this CPU")


def _moe_hooks(name: str, layer: torch.nn.Module, method: Any) -> Iterator[Hook]:
    backend = method.unquantized_backend.name
    if backend in _PLAIN_MOE_BACKENDS:
        return
    experts = compat.repackable_experts(method) if backend == "CPU" else None
    if experts is None:
        raise UnsupportedLoaderError(
            name, f"the weight layout of MoE backend {backend} (start with --moe-backend triton on a GPU)"
        )
    yield Hook(name, (experts,), lambda: experts.process_weights_after_loading(layer))


def _module_hooks(name: str, module: torch.nn.Module, dtype: torch.dtype) -> Iterator[Hook]:
    process = getattr(type(module), "process_weights_after_loading", None)
    if process is None:
        return
    owner = owner_of(process)
    derives = _MODULE_HOOKS.get(owner)
    if derives is None:
        raise UnsupportedLoaderError(name or type(module).__name__, f"the post-load hook of {owner}")
    impls = _impls_of(module)
    found = [_IMPL_HOOKS.get(owner_of(type(impl).process_weights_after_loading)) for impl in impls]
    if None in found:
        unknown = type(impls[found.index(None)]).__name__
        raise UnsupportedLoaderError(name, f"the post-load hook of attention backend {unknown}")
    if derives or any(found):
        yield Hook(name, (module, *impls), lambda: process(module, dtype))


def _impls_of(module: torch.nn.Module) -> tuple[Any, ...]:
    impl = getattr(module, "impl", None)
    variants = getattr(impl, "get_impl_variants", None)
    impls = variants() if callable(variants) else (impl,)
    return tuple(impl for impl in impls if hasattr(impl, "process_weights_after_loading"))


def _has_weights(layer: torch.nn.Module) -> bool:
    return next(layer.parameters(recurse=False), None) is not None
