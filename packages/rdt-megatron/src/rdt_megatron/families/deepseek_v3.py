"""DeepSeek-V3 and R1: multi-latent attention, shared experts, and a router with a bias for balance.

Multi-token prediction layers have no rules: engines load them for speculative decoding only.
"""

from __future__ import annotations

from rdt_megatron.families.blocks import (
    EMBEDDINGS,
    GATED_MLP,
    LATENT_ATTENTION,
    SHARED_EXPERTS,
    experts,
    router,
)
from rdt_megatron.rules import Family, Whole, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("deepseek_v3",),
    rules=(
        *EMBEDDINGS,
        *each_layer(
            *LATENT_ATTENTION,
            *GATED_MLP,
            *router("mlp.gate"),
            # A buffer that Megatron keeps in float32 and moves after every step, without a gradient.
            Whole("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            *SHARED_EXPERTS,
            *experts("mlp.experts.{expert}"),
        ),
    ),
)
