"""Models from a config.json: known sizes, and layouts that hold every element where the engines put it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.errors import ConfigError
from rdt_core.manifest import find_fault
from rdt_core.models.config import load_config, parse_config
from rdt_core.models.parameter import build_manifest
from rdt_core.models.preset import list_presets, load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.planner import build_plan_from
from rdt_core.sources import SourceIndex

if TYPE_CHECKING:
    from pathlib import Path

    from rdt_core.manifest import Manifest
    from rdt_core.models.units import Model

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}
BIASED = {**DENSE, "model_type": "qwen2", "tie_word_embeddings": False}
LATENT = {
    **DENSE,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}
CONFIGS = {"dense": DENSE, "biased": BIASED, "moe": MOE, "latent": LATENT}
TRAINER_LAYOUTS = (
    "megatron",
    "megatron:tp=4",
    "megatron:tp=8",
    "megatron:tp=2,pp=2",
    "megatron:pp=2,vpp=2,cp=2",
    "megatron:pp=3,first=1,last=1",
    "fsdp:dp=3",
    "fsdp:dp=2,replicate=2",
    "fsdp:dp=40",
)
EXPERT_LAYOUTS = ("megatron:tp=2,ep=4,dp=2", "megatron:tp=2,ep=2,etp=2,dp=2", "megatron:pp=2,ep=8")
ENGINE_LAYOUTS = (
    "vllm",
    "vllm:tp=2",
    "vllm:tp=8",
    "vllm:tp=2,dp=2",
    "vllm:pp=3",
    "sglang:tp=4",
    "vllm:dtype=float32",
)
EXPERT_ENGINES = (
    "vllm:tp=2,dp=2,ep",
    "sglang:tp=4,ep=2",
    "sglang:tp=4,dp=2,dp_attention,ep=4",
    "vllm:dp=3,ep",
)

# What transformers 5.19 counts in these models, made on the meta device from the same config values, buffers
# of the checkpoint included.
KNOWN_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "glm-4.5-air": 106_852_251_264,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
}


def manifests(model: Model, text: str) -> list[Manifest]:
    layout = make_trainer(parse_spec(text, TRAINERS), model)
    return [build_manifest(layout, rank, "node") for rank in range(layout.world_size)]


def engine_manifests(model: Model, text: str) -> list[Manifest]:
    layout = make_engine(parse_spec(text, ENGINES), model)
    return [build_manifest(layout, rank, "node") for rank in range(layout.world_size)]


def count_parameters(model: Model) -> int:
    return sum(math.prod(spec.shape) for spec in model.tensors())


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_has_as_many_parameters_as_the_published_checkpoint(name: str) -> None:
    assert count_parameters(describe_model(load_preset(name).config)) == KNOWN_PARAMETERS[name]


@pytest.mark.parametrize("name", list_presets())
def test_the_layouts_of_a_preset_divide_and_have_its_ranks(name: str) -> None:
    preset = load_preset(name)
    model = describe_model(preset.config)
    trainer = make_trainer(parse_spec(preset.trainer, TRAINERS), model, preset.trainer_ranks)
    engine = make_engine(parse_spec(preset.engine, ENGINES), model)
    assert trainer.world_size == preset.trainer_ranks
    assert preset.engine_ranks % engine.world_size == 0


@pytest.mark.parametrize("trainer", TRAINER_LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_ranks_of_every_trainer_layout_hold_the_whole_model_once(config: str, trainer: str) -> None:
    refuse_gaps(CONFIGS[config], trainer, "vllm")


@pytest.mark.parametrize("trainer", EXPERT_LAYOUTS)
@pytest.mark.parametrize("config", ["moe", "latent"])
def test_the_ranks_of_every_expert_layout_hold_the_whole_model_once(config: str, trainer: str) -> None:
    refuse_gaps(CONFIGS[config], trainer, "vllm:dp=3,ep")


@pytest.mark.parametrize("engine", ENGINE_LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_ranks_of_every_engine_layout_need_the_whole_model(config: str, engine: str) -> None:
    refuse_gaps(CONFIGS[config], "megatron:tp=4", engine)


@pytest.mark.parametrize("engine", EXPERT_ENGINES)
@pytest.mark.parametrize("config", ["moe", "latent"])
def test_the_ranks_of_every_engine_layout_with_whole_experts_need_it_all(config: str, engine: str) -> None:
    refuse_gaps(CONFIGS[config], "fsdp:dp=3", engine)


def refuse_gaps(config: dict[str, Any], trainer: str, engine: str) -> None:
    """The planner raises for a gap or an overlap; the engine's ranks together must need the whole model."""
    model = describe_model(parse_config(config))
    held = manifests(model, trainer)
    sources = SourceIndex(held)
    needed: dict[str, set[object]] = {}
    for manifest in engine_manifests(model, engine):
        assert find_fault(manifest) is None
        build_plan_from(manifest, sources)
        for shard in manifest.shards:
            needed.setdefault(shard.tensor, set()).add(shard.region)
    assert all(find_fault(manifest) is None for manifest in held)
    assert set(needed) == {spec.name for spec in model.tensors()}
    shapes = {spec.name: spec.shape for spec in model.tensors()}
    for name, regions in needed.items():
        distinct = sum(region.num_elements for region in regions)  # type: ignore[attr-defined]
        assert distinct == math.prod(shapes[name]), name


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    group_heads=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([2, 4, 8]),
)
def test_query_groups_are_cut_as_plain_rows_of_the_interleaved_matrix(
    tp: int, group_heads: int, groups: int
) -> None:
    config = {**DENSE, "num_attention_heads": group_heads * groups, "num_key_value_heads": groups}
    model = describe_model(parse_config({**config, "vocab_size": 256}))
    if (group_heads + 2) * groups * 4 % tp or group_heads * groups * 4 % tp:
        return
    dim, rows = 4, []
    for group in range(groups):
        rows += [("q_proj", row) for row in range(group * group_heads * dim, (group + 1) * group_heads * dim)]
        rows += [("k_proj", row) for row in range(group * dim, (group + 1) * dim)]
        rows += [("v_proj", row) for row in range(group * dim, (group + 1) * dim)]
    held = []
    for manifest in manifests(model, f"megatron:tp={tp}"):
        for shard in manifest.shards:
            if shard.window == "model.layers.0.self_attn.qkv_proj.weight":
                name = shard.tensor.split(".")[-2]
                held += [(name, row) for row in range(shard.region.start[0], shard.region.stop[0])]
    assert held == rows


def test_a_key_head_is_repeated_where_an_engine_has_more_ranks_than_heads() -> None:
    model = describe_model(parse_config(DENSE))
    regions = [
        str(shard.region)
        for manifest in engine_manifests(model, "vllm:tp=8")
        for shard in manifest.shards
        if shard.tensor == "model.layers.0.self_attn.k_proj.weight"
    ]
    assert regions == ["[0:4, 0:32]"] * 4 + ["[4:8, 0:32]"] * 4


def test_vllm_spreads_experts_over_data_parallel_ranks_and_slices_them_without_expert_parallel() -> None:
    model = describe_model(parse_config(MOE))

    def held(layout: str, rank: int) -> set[tuple[str, str]]:
        shards = engine_manifests(model, layout)[rank].shards
        return {
            (s.tensor.split(".")[5], str(s.region)) for s in shards if s.tensor.endswith("up_proj.weight")
        }

    assert held("vllm:tp=2,dp=2,ep", 1) == {("2", "[0:16, 0:32]"), ("3", "[0:16, 0:32]")}
    assert held("vllm:tp=2,dp=2", 1) == {(str(expert), "[4:8, 0:32]") for expert in range(8)}


def test_the_copy_of_a_tied_embedding_on_the_last_stage_is_a_replica() -> None:
    model = describe_model(parse_config(DENSE))
    first, last = manifests(model, "megatron:pp=2")
    assert "model.embed_tokens.weight" in first.tensors
    assert "model.embed_tokens.weight" in last.tensors
    assert "lm_head.weight" not in last.tensors


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("megatron:tp=3", "columns of"),
        ("megatron:pp=3", "first=N, last=N"),
        ("megatron:pp=3,first=1,last=2,vpp=2", "vpp"),
        ("megatron:ep=3", "does not divide by ep"),
    ],
)
def test_a_trainer_layout_that_does_not_divide_is_refused_with_the_sizes(text: str, complaint: str) -> None:
    model = describe_model(parse_config(MOE))
    with pytest.raises(ConfigError, match=complaint):
        manifests(model, text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("deepspeed:dp=2", "expected one of megatron, fsdp"),
        ("megatron:xp=2", "It takes tp, pp, cp"),
        ("megatron:tp=two", "an integer of 1 or more"),
        ("megatron:tp=0", "an integer of 1 or more"),
        ("megatron:tp", "an integer of 1 or more"),
        ("megatron:tp=2,tp=2", "twice"),
        ("fsdp:dp=2,dtype=int3", "bfloat16"),
    ],
)
def test_a_layout_with_an_unknown_word_is_refused_with_those_that_are_known(
    text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_spec(text, TRAINERS)


def test_ranks_that_the_axes_do_not_multiply_to_are_refused() -> None:
    model = describe_model(parse_config(DENSE))
    with pytest.raises(ConfigError, match="Leave dp out"):
        make_trainer(parse_spec("megatron:tp=2,dp=2", TRAINERS), model, 8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        (json.dumps({"model_type": "gpt2"}), "Known are deepseek_v3"),
        (json.dumps({**DENSE, "hidden_size": "wide"}), "hidden_size='wide'"),
        (json.dumps({**DENSE, "torch_dtype": "int4"}), "Quantized"),
    ],
)
def test_a_config_that_cannot_be_used_says_which_value(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        load_config(tmp_path)


def test_the_number_of_experts_is_found_under_the_name_that_transformers_5_saves() -> None:
    renamed = {key: value for key, value in MOE.items() if key != "num_experts"}
    assert parse_config({**renamed, "num_local_experts": 8}) == parse_config(MOE)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_that_a_table_lacks_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({**DENSE, key: True})


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)
