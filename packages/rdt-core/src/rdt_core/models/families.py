"""How families of models name their checkpoint's tensors. A new family is a new row here, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeNames:
    """Names in a mixture-of-experts layer, and the config keys of its sizes.

    Args:
        block: module below the layer that holds router and experts.
        gate, up, down: matrices of one expert.
        num_experts_key, intermediate_key: in config.json.
        shared: module of the shared expert, empty when the family has none.
        router_bias: float32 tensor beside the router's weight, empty when there is none.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    num_experts_key: str = "num_experts"
    intermediate_key: str = "moe_intermediate_size"
    shared: str = ""
    router_bias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the shapes in config.json do not say.

    Args:
        is_mla: latent attention (DeepSeek) instead of separate q, k and v.
        qk_norm, qkv_bias: always, never, or the config key that decides.
        is_tied_by_default: where config.json does not say.
        moe: names of its experts; None for a dense family.
    """

    is_mla: bool = False
    qk_norm: bool | str = False
    qkv_bias: bool | str = False
    is_tied_by_default: bool = False
    moe: MoeNames | None = None


_DEEPSEEK = Family(
    is_mla=True,
    moe=MoeNames(
        num_experts_key="n_routed_experts",
        shared="shared_experts",
        router_bias="e_score_correction_bias",
    ),
)

# Source: the modelling files of transformers 5.19, and the configs published beside the weights. The layers
# for multi-token prediction (num_nextn_predict_layers) are not trained by policy optimization and left out.
FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": Family(
        qk_norm="use_qk_norm",
        qkv_bias="attention_bias",
        moe=MoeNames(
            num_experts_key="n_routed_experts",
            shared="shared_experts",
            router_bias="e_score_correction_bias",
        ),
    ),
    "kimi_k2": _DEEPSEEK,
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(
        moe=MoeNames(
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            num_experts_key="num_local_experts",
            intermediate_key="intermediate_size",
        )
    ),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, moe=MoeNames()),
}
