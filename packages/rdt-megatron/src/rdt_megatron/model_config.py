"""What the configurations of Megatron and of the checkpoint say about a model, and what is refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_megatron.geometry import Sizes
from rdt_megatron.rules import Fused, tensors_of

if TYPE_CHECKING:
    from rdt_megatron.rules import Family


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a configuration cannot be exported, and what to do. The exporter makes a typed error of it."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A switch of Megatron's that makes memory differ from the checkpoint in more than its layout.

    Args:
        switch: field of Megatron's configuration.
        effect: what it does to memory.
        remedy: what the user can do.
    """

    switch: str
    effect: str
    remedy: str


# Source: megatron/core/transformer/transformer_config.py of 0.16.1 and 0.19.2; a missing switch is off.
REFUSALS = (
    Refusal(
        "layernorm_zero_centered_gamma",
        "norm weights are held as their distance from one",
        "Train with layernorm_zero_centered_gamma=False.",
    ),
    Refusal(
        "rotary_interleaved",
        "rows of query and key are in another order than the checkpoint's",
        "Train with rotary_interleaved=False.",
    ),
    Refusal(
        "moe_mlp_glu_interleave_size",
        "gate and up of every expert alternate in blocks",
        "Train with moe_mlp_glu_interleave_size=None.",
    ),
    Refusal(
        "moe_shared_expert_glu_interleave_size",
        "gate and up of the shared expert alternate in blocks",
        "Train with moe_shared_expert_glu_interleave_size=None.",
    ),
    Refusal(
        "attention_output_gate",
        "every query head is followed by a gate that no table describes",
        "Train with attention_output_gate=False.",
    ),
    Refusal("moe_latent_size", "experts work in a latent space", "Train with moe_latent_size=None."),
    Refusal(
        "moe_single_grouped_weight",
        "all experts of a rank share one grouped tensor",
        "Train with moe_single_grouped_weight=False.",
    ),
    Refusal("fp8_param", "parameters are quantized", "Keep high-precision parameters: fp8_param=False."),
)

# Megatron's field, and the names under which checkpoints of different families keep the same number.
_EQUALS = (
    ("num_layers", ("num_hidden_layers",)),
    ("hidden_size", ("hidden_size",)),
    ("num_attention_heads", ("num_attention_heads",)),
    ("num_query_groups", ("num_key_value_heads",)),
    ("num_moe_experts", ("num_experts", "num_local_experts", "n_routed_experts")),
)


def field_of(config: object, name: str) -> Any:
    """A setting of a config object or of a parsed ``config.json``; None where it has none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def sizes_of(megatron_config: object, hf_config: object) -> Sizes:
    """The global sizes that the rules ask for."""

    def own(name: str) -> int:
        return int(field_of(megatron_config, name) or 0)

    return Sizes(
        vocab=int(field_of(hf_config, "vocab_size")),
        is_tied=bool(field_of(hf_config, "tie_word_embeddings")),
        num_heads=own("num_attention_heads"),
        num_query_groups=own("num_query_groups") or own("num_attention_heads"),
        head_dim=own("kv_channels"),
        num_experts=own("num_moe_experts"),
        query_latent=own("q_lora_rank"),
        key_value_latent=own("kv_lora_rank") + own("qk_pos_emb_head_dim"),
    )


def find_objection(megatron_config: object, hf_config: object, family: Family) -> Objection | None:
    """The first reason why this model cannot be exported as this checkpoint; None when there is none."""
    if not field_of(hf_config, "vocab_size"):
        return Objection(
            "the checkpoint's config has no vocab_size, and Megatron knows the padded one only",
            "Pass the model's config.json, parsed, or its transformers config.",
        )
    return (
        _find_refused_switch(megatron_config)
        or _find_difference(megatron_config, hf_config)
        or _find_missing_gate(megatron_config, family)
    )


def _find_refused_switch(config: object) -> Objection | None:
    for refusal in REFUSALS:
        value = field_of(config, refusal.switch)
        # Multi-latent attention orders its rotary rows as the checkpoint does, whatever this switch says.
        if value and not (
            refusal.switch == "rotary_interleaved" and field_of(config, "multi_latent_attention")
        ):
            return Objection(f"with {refusal.switch}={value} {refusal.effect}", refusal.remedy)
    return None


def _find_difference(megatron_config: object, hf_config: object) -> Objection | None:
    for own, names in _EQUALS:
        ours = field_of(megatron_config, own)
        theirs = next((n for n in names if isinstance(field_of(hf_config, n), int)), None)
        if ours is not None and theirs is not None and ours != field_of(hf_config, theirs):
            return Objection(
                f"{own} is {ours} in Megatron's config, and {theirs} is {field_of(hf_config, theirs)} in the "
                "checkpoint's",
                "Pass the config.json of the model that is trained.",
            )
    return None


def _find_missing_gate(config: object, family: Family) -> Objection | None:
    """A gated table would cut a plain MLP in two, and only the engine could see it, by the shapes."""
    has_gates = any(
        isinstance(rule, Fused) and rule.interleave == "by_rank" and len(tensors_of(rule)) > 1
        for rule in family.rules
    )
    if has_gates != bool(field_of(config, "gated_linear_unit")):
        return Objection(
            f"gated_linear_unit is {field_of(config, 'gated_linear_unit')}, and {family.table} describes "
            f"{'gated' if has_gates else 'plain'} MLPs",
            "Use the family of the model that is trained.",
        )
    return None
