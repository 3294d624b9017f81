"""The tables of model families, how a parameter finds its rule, and which configurations are refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from rdt_megatron import families
from rdt_megatron.families import UnknownModelTypeError, find_family
from rdt_megatron.families.blocks import EMBEDDINGS
from rdt_megatron.model_config import find_objection, sizes_of
from rdt_megatron.rules import Family, Fused, RuleIndex, StackedExperts, Whole, tensors_of

MODEL_TYPES = ("deepseek_v3", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
MEGATRON: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 2,
    "gated_linear_unit": True,
}  # fmt: skip
CHECKPOINT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 10, "num_hidden_layers": 2, "hidden_size": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_rule_of_a_family_is_found_by_the_names_it_is_for(model_type: str) -> None:
    family = find_family(model_type)
    assert family.table == f"rdt_megatron.families.{model_type}"
    index = RuleIndex(family.rules)
    for rule in family.rules:
        match = index.find(rule.parameter.format(layer=12, expert=7))
        assert match is not None
        assert match.rule == rule
        assert match.layer == (12 if "{layer}" in rule.parameter else None)
        assert match.expert == (7 if "{expert}" in rule.parameter else None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_names_of_tensors_take_the_numbers_that_their_parameter_has(model_type: str) -> None:
    for rule in find_family(model_type).rules:
        for tensor in tensors_of(rule):
            assert ("{layer}" in tensor) == ("{layer}" in rule.parameter), tensor
            counts_experts = "{expert}" in rule.parameter or isinstance(rule, StackedExperts)
            assert ("{expert}" in tensor) == counts_experts, tensor


def test_a_name_with_digits_of_its_own_is_not_taken_for_a_numbered_one() -> None:
    index = RuleIndex(find_family("mixtral").rules)
    stacked = index.find("decoder.layers.0.mlp.experts.weight1")
    grouped = index.find("decoder.layers.10.mlp.experts.linear_fc1.weight12")
    assert stacked is not None
    assert grouped is not None
    assert isinstance(stacked.rule, StackedExperts)
    assert isinstance(grouped.rule, Fused)
    assert (grouped.layer, grouped.expert) == (10, 12)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.scale",
        "decoder.layers.x.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc3.weight",
        "mtp.layers.0.enorm.weight",
        "prefix.decoder.final_layernorm.weight",
    ],
)
def test_a_name_without_a_rule_finds_none(name: str) -> None:
    assert RuleIndex(find_family("deepseek_v3").rules).find(name) is None


def test_a_model_type_that_no_family_serves_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnknownModelTypeError, match=r"'gpt9'; known are \['deepseek_v3', 'llama'"):
        find_family("gpt9")


OWN = Family(table=__name__, model_types=("own",), rules=(*EMBEDDINGS, Whole("x", "y")))


def test_another_package_offers_a_family_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = EntryPoints(
        [
            EntryPoint("own", f"{__name__}:OWN", families.ENTRY_POINTS),
            EntryPoint("bad", f"{__name__}:MODEL_TYPES", families.ENTRY_POINTS),
        ]
    )
    monkeypatch.setattr(families, "entry_points", offered.select)
    assert find_family("own").rules == OWN.rules
    assert find_family("qwen3").table == "rdt_megatron.families.qwen3"
    with pytest.raises(UnknownModelTypeError, match="is a tuple, no Family"):
        find_family("bad")


def test_sizes_come_from_both_configurations() -> None:
    sizes = sizes_of(MEGATRON, CHECKPOINT)
    assert (sizes.vocab, sizes.is_tied) == (10, True)
    assert (sizes.num_heads, sizes.num_query_groups, sizes.head_dim, sizes.num_experts) == (4, 2, 2, 0)


def test_configurations_of_one_model_raise_no_objection() -> None:
    assert find_objection(MEGATRON, CHECKPOINT, find_family("llama")) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ({"layernorm_zero_centered_gamma": True}, {}, "distance from one"),
        ({"moe_mlp_glu_interleave_size": 32}, {}, "moe_mlp_glu_interleave_size=32"),
        ({"rotary_interleaved": True}, {}, "another order"),
        ({"attention_output_gate": True}, {}, "followed by a gate"),
        ({"fp8_param": True}, {}, "quantized"),
        ({"gated_linear_unit": False}, {}, "describes gated MLPs"),
        ({"num_layers": 3}, {}, "num_layers is 3 in Megatron's config, and num_hidden_layers is 2"),
        ({"num_moe_experts": 4}, {"n_routed_experts": 8}, "n_routed_experts is 8"),
        ({}, {"vocab_size": None}, "has no vocab_size"),
    ],
)
def test_what_makes_memory_differ_in_more_than_layout_is_refused(
    ours: dict[str, Any], theirs: dict[str, Any], reason: str
) -> None:
    objection = find_objection(MEGATRON | ours, CHECKPOINT | theirs, find_family("llama"))
    assert objection is not None
    assert reason in objection.reason
    assert objection.remedy.endswith(".")
