"""Llama, with or without biases."""

from __future__ import annotations

from rdt_megatron.families.blocks import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS
from rdt_megatron.rules import Family, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("llama",),
    rules=(*EMBEDDINGS, *each_layer(*NORMS, *ATTENTION, *GATED_MLP)),
)
