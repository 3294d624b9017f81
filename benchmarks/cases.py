"""The models that benchmarks move: names and shapes of checkpoint tensors, and how ranks cut them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rdt_core import Region

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens")
ROW_PARALLEL = ("o_proj", "down_proj")
_NUM_EXPERTS = 128


class Case(Protocol):
    """A set of checkpoint tensors."""

    @property
    def name(self) -> str:
        """As given on the command line."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder by its config values.

    Args:
        name: as given on the command line.
        vocab, hidden, intermediate, layers, heads, kv_heads, head_dim: as in config.json.
        has_qk_norm: whether every layer has q and k norms (Qwen3).
        experts: how many a layer has, each of the intermediate size; 0 for a dense model.
    """

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    has_qk_norm: bool
    experts: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors by name; embeddings are tied."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (query, self.hidden),
                f"{prefix}.self_attn.k_proj.weight": (key, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (key, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, query),
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
            }
            for mlp in self._mlps(prefix):
                shapes |= {
                    f"{mlp}.gate_proj.weight": (self.intermediate, self.hidden),
                    f"{mlp}.up_proj.weight": (self.intermediate, self.hidden),
                    f"{mlp}.down_proj.weight": (self.hidden, self.intermediate),
                }
            if self.experts:
                shapes[f"{prefix}.mlp.gate.weight"] = (self.experts, self.hidden)
            if self.has_qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes

    def _mlps(self, prefix: str) -> list[str]:
        if not self.experts:
            return [f"{prefix}.mlp"]
        return [f"{prefix}.mlp.experts.{expert}" for expert in range(self.experts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Even:
    """So many tensors of one size, to see what a sync costs by bytes and by tensors."""

    name: str
    num_tensors: int
    nbytes: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Matrices of 1,024 columns."""
        rows = self.nbytes // (2 * 1024 * self.num_tensors)
        return {f"layer.{index}.weight": (rows, 1024) for index in range(self.num_tensors)}


QWEN3 = Decoder(
    name="qwen3-0.6b",
    vocab=151936,
    hidden=1024,
    intermediate=3072,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    has_qk_norm=True,
)
# Qwen3-30B-A3B with a quarter of its layers, 15.6 GB, and with half of them, 30.5 GB.
QWEN3_MOE = tuple(
    Decoder(
        name=f"qwen3-30b-a3b-{part}",
        vocab=151936,
        hidden=2048,
        intermediate=768,
        layers=layers,
        heads=32,
        kv_heads=4,
        head_dim=128,
        has_qk_norm=True,
        experts=_NUM_EXPERTS,
    )
    for part, layers in (("quarter", 12), ("half", 24))
)
SMOLLM2 = Decoder(
    name="smollm2",
    vocab=49152,
    hidden=576,
    intermediate=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    has_qk_norm=False,
)
_SIZES = {"0.1gb": 100, "0.3gb": 300, "8gb": 8_000, "24gb": 24_000}
_ALL: tuple[Case, ...] = (
    SMOLLM2,
    QWEN3,
    *QWEN3_MOE,
    Even(name="tiny", num_tensors=10, nbytes=1_000_000),
    *(Even(name=name, num_tensors=310, nbytes=mb * 1_000_000) for name, mb in _SIZES.items()),
    *(Even(name=f"{n}-tensors", num_tensors=n, nbytes=1_192_099_840) for n in (310, 3_000, 37_000)),
)
CASES = {case.name: case for case in _ALL}


def num_bytes(case: str, itemsize: int = 2) -> int:
    """Bytes of all tensors of a case."""
    return sum(itemsize * math.prod(shape) for shape in CASES[case].shapes().values())


def region_of(name: str, shape: tuple[int, ...], rank: int, size: int) -> Region:
    """What a tensor-parallel rank of ``size`` holds: rows, columns, or all of it."""
    dim = dim_of(name)
    if dim is None or size == 1:
        return Region.whole(shape)
    start, stop = [0] * len(shape), list(shape)
    start[dim], stop[dim] = shape[dim] * rank // size, shape[dim] * (rank + 1) // size
    return Region(tuple(start), tuple(stop))


def held_by_trainer(name: str, shape: tuple[int, ...], rank: int, size: int, layout: str) -> Region | None:
    """What a trainer rank of ``size`` holds of a tensor, None for nothing.

    Args:
        name: of the tensor.
        shape: its global shape.
        rank: of the trainer.
        size: trainer ranks.
        layout: ``"tp"`` cuts tensors as :func:`region_of` does. ``"ep"`` gives every rank its part of the
            experts, whole, and all that is no expert's.
    """
    if layout == "tp":
        return region_of(name, shape, rank, size)
    expert = expert_of(name)
    is_held = expert is None or expert * size // _NUM_EXPERTS == rank
    return Region.whole(shape) if is_held else None


def expert_of(name: str) -> int | None:
    """The expert that a tensor belongs to; None when to none."""
    _, found, rest = name.partition(".experts.")
    return int(rest.partition(".")[0]) if found else None


def dim_of(name: str) -> int | None:
    """Along which dim tensor-parallel ranks cut a tensor; None when each has all of it."""
    parts = name.split(".")
    if any(part in COLUMN_PARALLEL for part in parts):
        return 0
    return 1 if any(part in ROW_PARALLEL for part in parts) else None
