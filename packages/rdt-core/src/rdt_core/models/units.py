"""A model's checkpoint tensors, grouped into the units that trainers and engines cut and fuse.

Every unit stands for one or more checkpoint tensors; its class says how parallelism may cut it. A layout has
one rule a class of unit and none a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from rdt_core.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.models.config import Mla, ModelConfig, Moe


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embedding or lm_head: rows cut over tensor-parallel ranks, padded to a multiple."""

    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Whole:
    """Held in full by every tensor-parallel rank. Engines fuse several (MLA's down projections) in order."""

    parameter: str
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Column-parallel: dim 0 of each tensor is cut evenly; the parts of a rank follow each other."""

    parameter: str
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """Row-parallel: dim 1 is cut evenly."""

    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Heads:
    """q, k and v of grouped-query attention, weights or biases: cut by heads."""

    parameter: str
    query: TensorSpec
    key: TensorSpec
    value: TensorSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer, ``(gate, up, down)`` by expert: cut by expert, then inside of each."""

    parameter: str
    by_expert: tuple[tuple[TensorSpec, TensorSpec, TensorSpec], ...]


Unit: TypeAlias = Vocabulary | Whole | Rows | Columns | Heads | Experts


@dataclass(frozen=True, slots=True)
class Model:
    """All units by where they stand in a pipeline.

    Args:
        config: sizes.
        embedding: of the first stage.
        layers: units of every decoder layer.
        final: the last stage's: norm, and lm_head unless it is tied.
    """

    config: ModelConfig
    embedding: Vocabulary
    layers: tuple[tuple[Unit, ...], ...]
    final: tuple[Unit, ...]

    def tensors(self) -> Iterator[TensorSpec]:
        """Every checkpoint tensor."""
        for unit in (self.embedding, *(unit for layer in self.layers for unit in layer), *self.final):
            yield from specs_of(unit)


def specs_of(unit: Unit) -> Iterator[TensorSpec]:
    """The checkpoint tensors of a unit."""
    match unit:
        case Vocabulary() | Columns():
            yield unit.spec
        case Whole() | Rows():
            yield from unit.specs
        case Heads():
            yield from (unit.query, unit.key, unit.value)
        case Experts():
            for matrices in unit.by_expert:
                yield from matrices


def describe_model(config: ModelConfig) -> Model:
    """The units of a model. Pure, linear in the number of tensors."""
    embedding = Vocabulary(_spec(config, "model.embed_tokens.weight", config.vocab, config.hidden))
    head = (
        () if config.is_tied else (Vocabulary(_spec(config, "lm_head.weight", config.vocab, config.hidden)),)
    )
    return Model(
        config=config,
        embedding=embedding,
        layers=tuple(tuple(_layer_units(config, layer)) for layer in range(config.layers)),
        final=(_whole(config, "model.norm.weight", config.hidden), *head),
    )


def _spec(config: ModelConfig, name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, shape, config.dtype)


def _whole(config: ModelConfig, name: str, *shape: int) -> Whole:
    return Whole(name, (_spec(config, name, *shape),))


def _layer_units(config: ModelConfig, layer: int) -> Iterator[Unit]:
    prefix = f"model.layers.{layer}"
    yield _whole(config, f"{prefix}.input_layernorm.weight", config.hidden)
    attention = f"{prefix}.self_attn"
    if config.mla is None:
        yield from _grouped_query_units(config, attention)
    else:
        yield from _latent_units(config, config.mla, attention)
    yield _whole(config, f"{prefix}.post_attention_layernorm.weight", config.hidden)
    if config.moe is not None and layer in config.moe.layers:
        yield from _moe_units(config, config.moe, prefix)
    else:
        yield from _mlp_units(config, f"{prefix}.mlp", config.intermediate)


def _grouped_query_units(config: ModelConfig, prefix: str) -> Iterator[Unit]:
    rows = config.heads * config.head_dim
    yield _heads(config, prefix, "weight", (config.hidden,))
    if config.has_qkv_bias:
        yield _heads(config, prefix, "bias", ())
    yield Columns(_spec(config, f"{prefix}.o_proj.weight", config.hidden, rows))
    if config.has_qk_norm:
        yield _whole(config, f"{prefix}.q_norm.weight", config.head_dim)
        yield _whole(config, f"{prefix}.k_norm.weight", config.head_dim)


def _heads(config: ModelConfig, prefix: str, kind: str, columns: tuple[int, ...]) -> Heads:
    def spec(name: str, heads: int) -> TensorSpec:
        return _spec(config, f"{prefix}.{name}.{kind}", heads * config.head_dim, *columns)

    return Heads(
        f"{prefix}.qkv_proj.{kind}",
        spec("q_proj", config.heads),
        spec("k_proj", config.kv_heads),
        spec("v_proj", config.kv_heads),
        config.heads,
        config.kv_heads,
        config.head_dim,
    )


def _latent_units(config: ModelConfig, mla: Mla, prefix: str) -> Iterator[Unit]:
    head_rows = config.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    latent = _spec(
        config,
        f"{prefix}.kv_a_proj_with_mqa.weight",
        mla.kv_lora_rank + mla.qk_rope_head_dim,
        config.hidden,
    )
    if mla.q_lora_rank:
        down = _spec(config, f"{prefix}.q_a_proj.weight", mla.q_lora_rank, config.hidden)
        up = _spec(config, f"{prefix}.q_b_proj.weight", head_rows, mla.q_lora_rank)
        yield Whole(f"{prefix}.fused_qkv_a_proj.weight", (down, latent))
        yield _whole(config, f"{prefix}.q_a_layernorm.weight", mla.q_lora_rank)
    else:
        up = _spec(config, f"{prefix}.q_proj.weight", head_rows, config.hidden)
        yield Whole(latent.name, (latent,))
    yield Rows(up.name, (up,))
    yield _whole(config, f"{prefix}.kv_a_layernorm.weight", mla.kv_lora_rank)
    expanded = config.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    kv_up = _spec(config, f"{prefix}.kv_b_proj.weight", expanded, mla.kv_lora_rank)
    yield Rows(kv_up.name, (kv_up,))
    yield Columns(_spec(config, f"{prefix}.o_proj.weight", config.hidden, config.heads * mla.v_head_dim))


def _mlp_units(config: ModelConfig, prefix: str, intermediate: int) -> Iterator[Unit]:
    gate, up = (
        _spec(config, f"{prefix}.{name}.weight", intermediate, config.hidden)
        for name in ("gate_proj", "up_proj")
    )
    yield Rows(f"{prefix}.gate_up_proj.weight", (gate, up))
    yield Columns(_spec(config, f"{prefix}.down_proj.weight", config.hidden, intermediate))


def _moe_units(config: ModelConfig, moe: Moe, layer: str) -> Iterator[Unit]:
    names, prefix = moe.names, f"{layer}.{moe.names.block}"
    yield _whole(config, f"{prefix}.gate.weight", moe.num_experts, config.hidden)
    if names.router_bias:
        bias = TensorSpec(f"{prefix}.gate.{names.router_bias}", (moe.num_experts,), "float32")
        yield Whole(bias.name, (bias,))
    if moe.shared_intermediate:
        yield from _mlp_units(config, f"{prefix}.{names.shared}", moe.shared_intermediate)
    wide, tall = (moe.intermediate, config.hidden), (config.hidden, moe.intermediate)
    yield Experts(
        f"{prefix}.experts",
        tuple(
            (
                TensorSpec(f"{prefix}.experts.{expert}.{names.gate}.weight", wide, config.dtype),
                TensorSpec(f"{prefix}.experts.{expert}.{names.up}.weight", wide, config.dtype),
                TensorSpec(f"{prefix}.experts.{expert}.{names.down}.weight", tall, config.dtype),
            )
            for expert in range(moe.num_experts)
        ),
    )
