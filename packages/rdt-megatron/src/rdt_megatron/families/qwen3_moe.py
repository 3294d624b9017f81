"""Qwen3-MoE: Qwen3 with experts in all layers, or in all but a few dense ones."""

from __future__ import annotations

from rdt_megatron.families.blocks import (
    ATTENTION,
    EMBEDDINGS,
    GATED_MLP,
    NORMS,
    QK_NORMS,
    experts,
    router,
)
from rdt_megatron.rules import Family, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("qwen3_moe",),
    rules=(
        *EMBEDDINGS,
        *each_layer(
            *NORMS,
            *ATTENTION,
            *QK_NORMS,
            *GATED_MLP,
            *router("mlp.gate"),
            *experts("mlp.experts.{expert}"),
        ),
    ),
)
