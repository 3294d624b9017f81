"""Rules that several families share: the parts of a decoder under transformers' usual names."""

from __future__ import annotations

from rdt_megatron.rules import Fused, Rule, Split, StackedExperts, Vocabulary, Whole

EMBEDDINGS: tuple[Rule, ...] = (
    Vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Vocabulary("output_layer.weight", "lm_head.weight", tied_into="model.embed_tokens.weight"),
    Whole("decoder.final_layernorm.weight", "model.norm.weight"),
)

# What follows is written from a layer's own prefix; see rules.each_layer. Transformer Engine's layer specs
# keep a norm in the linear layer behind it, under a name of its own.
NORMS: tuple[Rule, ...] = (
    Whole("input_layernorm.weight", "input_layernorm.weight"),
    Whole("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    Whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    Whole("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION: tuple[Rule, ...] = (
    *(
        Fused(
            f"self_attention.linear_qkv.{kind}",
            into=tuple(f"{name}.{kind}" for name in _QKV),
            interleave="by_query_group",
        )
        for kind in ("weight", "bias")
    ),
    Split("self_attention.linear_proj.weight", "self_attn.o_proj.weight", dim=1),
    Whole("self_attention.linear_proj.bias", "self_attn.o_proj.bias"),
)
QK_NORMS: tuple[Rule, ...] = (
    Whole("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    Whole("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

# Multi-latent attention. The local layer spec splits the down projections, Transformer Engine's repeats them.
LATENT_ATTENTION: tuple[Rule, ...] = (
    Whole("input_layernorm.weight", "input_layernorm.weight"),
    Split("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight"),
    Split("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", size="query_latent"),
    Split("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight"),
    Split(
        "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        size="key_value_latent",
    ),
    Split("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight"),
    Split("self_attention.linear_proj.weight", "self_attn.o_proj.weight", dim=1),
    Whole("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight"),
    Whole("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight"),
    Whole("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
    Whole("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight"),
    Whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    Whole("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
)

GATED_MLP: tuple[Rule, ...] = (
    Fused("mlp.linear_fc1.weight", into=("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Fused("mlp.linear_fc1.bias", into=("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    Split("mlp.linear_fc2.weight", "mlp.down_proj.weight", dim=1),
    Whole("mlp.linear_fc2.bias", "mlp.down_proj.bias"),
)

SHARED_EXPERTS: tuple[Rule, ...] = (
    Fused(
        "mlp.shared_experts.linear_fc1.weight",
        into=("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    ),
    Split("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight", dim=1),
)


def router(into: str) -> tuple[Rule, ...]:
    """The router's weight, under a family's name for the module."""
    return (Whole("mlp.router.weight", f"{into}.weight"),)


def experts(
    into: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Gated experts as Megatron's three kinds hold them: one by one, grouped, and stacked.

    Args:
        into: the family's name of one expert, with ``{expert}``.
        gate: the family's names of its matrices.
        up: likewise.
        down: likewise.
    """
    gate_up, down_ = (f"{into}.{gate}.weight", f"{into}.{up}.weight"), f"{into}.{down}.weight"
    return (
        Fused("mlp.experts.local_experts.{expert}.linear_fc1.weight", into=gate_up, axis="etp"),
        Split("mlp.experts.local_experts.{expert}.linear_fc2.weight", into=down_, dim=1, axis="etp"),
        Fused("mlp.experts.linear_fc1.weight{expert}", into=gate_up, axis="etp"),
        Split("mlp.experts.linear_fc2.weight{expert}", into=down_, dim=1, axis="etp"),
        StackedExperts("mlp.experts.weight1", into=gate_up, stacked_dim=1),
        StackedExperts("mlp.experts.weight2", into=(down_,), stacked_dim=0),
    )
