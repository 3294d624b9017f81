"""StarCoder2, as a user would add it: a plain MLP, biases everywhere, norms with a bias."""

from __future__ import annotations

from rdt_megatron.families.blocks import ATTENTION, EMBEDDINGS, NORMS
from rdt_megatron.rules import Family, Split, Whole, each_layer

FAMILY = Family(
    table=__name__,
    model_types=("starcoder2",),
    rules=(
        *EMBEDDINGS,
        Whole("decoder.final_layernorm.bias", "model.norm.bias"),
        *each_layer(
            *NORMS,
            Whole("input_layernorm.bias", "input_layernorm.bias"),
            Whole("pre_mlp_layernorm.bias", "post_attention_layernorm.bias"),
            *ATTENTION,
            Split("mlp.linear_fc1.weight", "mlp.c_fc.weight"),
            Split("mlp.linear_fc1.bias", "mlp.c_fc.bias"),
            Split("mlp.linear_fc2.weight", "mlp.c_proj.weight", dim=1),
            Whole("mlp.linear_fc2.bias", "mlp.c_proj.bias"),
        ),
    ),
)
