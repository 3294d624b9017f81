"""What SGLang derives from weights after a load, and how to derive it again after a commit.

SGLang runs two kinds of post-load hooks: ``quant_method.process_weights_after_loading(layer)`` of every layer
with weights, and the model's own ``post_load_weights``. Each is listed here by the class that implements it.
What is not listed might lay parameters out anew, so it is refused when an engine connects, by the layer's
name, and never run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdt_core.derived import Hook, owner_of
from rdt_core.errors import UnsupportedLoaderError
from rdt_sglang import compat

if TYPE_CHECKING:
    import torch

_LAYERS = "sglang.srt.layers"
_MOE = f"{_LAYERS}.quantization.unquant.UnquantizedFusedMoEMethod"

# Hooks of layers with weights that leave them as their loader wrote them, here or under the checks below.
_LAYER_HOOKS = frozenset(
    {
        _MOE,
        f"{_LAYERS}.quantization.base_config.QuantizeMethodBase",
        f"{_LAYERS}.quantization.unquant.UnquantizedLinearMethod",
    }
)

# Hooks of models that derive tensors from weights and may be run again at every commit.
_MODEL_HOOKS = frozenset(
    {"sglang.srt.models.deepseek_common.deepseek_weight_loader.DeepseekV2WeightLoaderMixin"}
)

# What a method of expert layers says of itself when weights left the loader's layout: for good, or so that
# its own restore_weights_before_loading brings them back.
_INTERLEAVED = "w13_swiglu_interleaved"
_BLOCKED = "use_flashinfer_trtllm_moe"

_PACKED = "use_intel_amx_backend"


def find_hooks(model: Any) -> tuple[Hook, ...]:
    """Every computation to repeat after weights change.

    Called at connect on each rank; runs nothing.

    Args:
        model: loaded and processed.

    Raises:
        UnsupportedLoaderError: a layer's weights are not laid out as its loader writes them, or a hook is
            unknown.

    Source: sglang 0.5.23 srt/model_loader/loader.py, post_load_weights and postprocess_weights.
    """
    refusal = compat.derived_cache_error(model)
    if refusal is not None:
        raise UnsupportedLoaderError(type(model).__name__, f"a cache of derived weights ({refusal})")
    for name, module in model.named_modules():
        _check_layer(name or type(model).__name__, module)
    process = getattr(type(model), "post_load_weights", None)
    if process is None:
        return ()
    if owner_of(process) not in _MODEL_HOOKS:
        raise UnsupportedLoaderError(type(model).__name__, f"the post-load hook of {owner_of(process)}")
    return (Hook(type(model).__name__, tuple(model.modules()), model.post_load_weights),)


def is_packed(model: Any) -> bool:
    """Whether weights are packed in place after a load, in a way that SGLang undoes before the next one.

    Source: layers/quantization/unquant.py, restore_weights_before_loading (0.5.23).
    """
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    return any(getattr(method, _BLOCKED, False) for method in methods)


def _check_layer(name: str, layer: torch.nn.Module) -> None:
    method: Any = getattr(layer, "quant_method", None)
    process = getattr(type(method), "process_weights_after_loading", None)
    if process is None:
        return
    if owner_of(process) not in _LAYER_HOOKS:
        if next(layer.parameters(recurse=False), None) is not None:
            raise UnsupportedLoaderError(name, f"{type(method).__name__}'s own weight layout (quantization)")
        return
    if getattr(layer, _PACKED, False):
        raise UnsupportedLoaderError(name, "packing of weights for this CPU")
    if owner_of(process) == _MOE:
        _check_experts(name, method)


def _check_experts(name: str, method: Any) -> None:
    if getattr(method, _INTERLEAVED, False):
        raise UnsupportedLoaderError(name, "interleaved rows (unset SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED)")
    if compat.is_shuffled(method):
        raise UnsupportedLoaderError(
            name, "weights shuffled for AITER (start with --moe-runner-backend triton)"
        )
