"""Qwen3: Llama with norms on each query and key head."""

from __future__ import annotations

from rdt_megatron.families.blocks import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS, QK_NORMS
from rdt_megatron.rules import Family, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("qwen3",),
    rules=(*EMBEDDINGS, *each_layer(*NORMS, *ATTENTION, *QK_NORMS, *GATED_MLP)),
)
