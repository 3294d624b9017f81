"""Mixtral, whose checkpoints call the experts' matrices w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from rdt_megatron.families.blocks import ATTENTION, EMBEDDINGS, NORMS, experts, router
from rdt_megatron.rules import Family, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("mixtral",),
    rules=(
        *EMBEDDINGS,
        *each_layer(
            *NORMS,
            *ATTENTION,
            *router("block_sparse_moe.gate"),
            *experts("block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2"),
        ),
    ),
)
