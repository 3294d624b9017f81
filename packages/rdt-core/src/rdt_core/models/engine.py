"""How the ranks of one vLLM or SGLang engine hold a model: fused, sharded, padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.models.divide import block, divide, round_up
from rdt_core.models.parameter import Parameter, cut_dim, whole
from rdt_core.models.units import Columns, Experts, Heads, Rows, Vocabulary, Whole, specs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.manifest import TensorSpec
    from rdt_core.models.units import Model, Unit
    from rdt_core.region import Region

# Source: vllm/model_executor/layers/vocab_parallel_embedding.py and its copy in SGLang.
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAxes:
    """Sizes of an engine's parallel groups.

    Args:
        tp: ranks that share the attention's heads.
        mlp_tp: ranks that share dense MLPs.
        pp: pipeline stages.
        groups: tensor-parallel groups of one stage (data parallel attention).
        ep: expert-parallel ranks; 1 when every rank holds a slice of every expert.
        expert_tp: ranks that share one expert's matrices.
        dtype: of the parameters where it differs from the checkpoint's.
    """

    tp: int = 1
    mlp_tp: int = 1
    pp: int = 1
    groups: int = 1
    ep: int = 1
    expert_tp: int = 1
    dtype: str = ""


class EngineLayout:
    """What every rank of one engine holds; tensor-parallel ranks count fastest, then stages, then groups.

    Source: vLLM 0.32 ``layers/linear.py`` (QKVParallelLinear repeats key and value heads where there are
    fewer than ranks), ``fused_moe/layer.py`` (w13 is [gate; up] an expert; the first ranks get one expert
    more), ``distributed/utils.py`` (get_pp_indices), and SGLang 0.5.23's copies of these.

    Raises:
        ConfigError: a size does not divide.
    """

    side = "engine"

    def __init__(self, model: Model, axes: EngineAxes) -> None:
        self._model, self._axes = model, axes
        self.world_size = axes.tp * axes.pp * axes.groups
        self._stages = _assign_layers(model.config.layers, axes.pp)

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """See :class:`rdt_core.models.parameter.Layout`."""
        axes = self._axes
        group, place = divmod(rank, axes.tp * axes.pp)
        stage, tp_rank = divmod(place, axes.tp)
        in_stage = group * axes.tp + tp_rank
        is_last = stage == axes.pp - 1
        if stage == 0 or (is_last and self._model.config.is_tied):
            yield self._cut(self._model.embedding, tp_rank, in_stage)
        for layer in self._stages[stage]:
            for unit in self._model.layers[layer]:
                if isinstance(unit, Experts):
                    yield from self._cut_experts(unit, in_stage)
                else:
                    yield self._cut(unit, tp_rank, in_stage)
        if is_last:
            for unit in self._model.final:
                yield self._cut(unit, tp_rank, in_stage)

    def _cut(self, unit: Unit, tp_rank: int, in_stage: int) -> Parameter:
        axes, dtype = self._axes, self._axes.dtype
        match unit:
            case Vocabulary():
                rows, columns = unit.spec.shape
                padded = round_up(rows, max(VOCABULARY_MULTIPLE, axes.tp))
                start, stop = block(padded, axes.tp, tp_rank, "padded vocabulary", "tp")
                spec, region = cut_dim(unit.spec, 0, start, stop)
                padding = (stop - start) * columns - region.num_elements
                return Parameter(spec.name, ((spec, region),), padding, dtype)
            case Whole():
                # A router's bias stays float32 in every engine.
                is_bias = unit.specs[0].dtype == "float32"
                return Parameter(unit.parameter, whole(specs_of(unit)), dtype="" if is_bias else dtype)
            case Rows():
                parts = tuple(
                    cut_dim(s, 0, *self._block(s.shape[0], s.name, tp_rank, in_stage)) for s in unit.specs
                )
                return Parameter(unit.parameter, parts, dtype=dtype)
            case Columns():
                columns_held = self._block(unit.spec.shape[1], unit.spec.name, tp_rank, in_stage)
                return Parameter(unit.spec.name, (cut_dim(unit.spec, 1, *columns_held),), dtype=dtype)
            case Heads():
                return Parameter(unit.parameter, tuple(_heads_of(unit, axes.tp, tp_rank)), dtype=dtype)
            case Experts():
                raise TypeError("experts are cut by expert parallel ranks")

    def _block(self, size: int, name: str, tp_rank: int, in_stage: int) -> tuple[int, int]:
        """Rows or columns of a cut matrix; MLPs may be shared by more ranks than attention."""
        axes = self._axes
        if ".self_attn." in name:
            return block(size, axes.tp, tp_rank, f"size of {name}", "tp")
        return block(size, axes.mlp_tp, in_stage % axes.mlp_tp, f"size of {name}", "tp")

    def _cut_experts(self, unit: Experts, in_stage: int) -> Iterator[Parameter]:
        axes, experts = self._axes, unit.by_expert
        ep_rank, expert_tp_rank = divmod(in_stage % (axes.ep * axes.expert_tp), axes.expert_tp)
        first, last = _expert_range(len(experts), axes.ep, ep_rank)
        gate, _, down = experts[0]
        rows = block(gate.shape[0], axes.expert_tp, expert_tp_rank, f"rows of {gate.name}", "tp")
        wide, tall = cut_dim(gate, 0, *rows)[1], cut_dim(down, 1, *rows)[1]
        held = experts[first:last]
        w13 = tuple(part for gate, up, _ in held for part in ((gate, wide), (up, wide)))
        yield Parameter(f"{unit.parameter}.w13_weight", w13, dtype=axes.dtype)
        yield Parameter(f"{unit.parameter}.w2_weight", tuple((d, tall) for _, _, d in held), dtype=axes.dtype)


def _heads_of(unit: Heads, tp: int, tp_rank: int) -> Iterator[tuple[TensorSpec, Region]]:
    """[q; k; v] of a rank; a key or value head is repeated where there are fewer than ranks."""
    dim = unit.head_dim
    first, last = block(unit.num_heads, tp, tp_rank, "number of heads", "tp")
    yield cut_dim(unit.query, 0, first * dim, last * dim)
    if unit.num_kv_heads >= tp:
        first, last = block(unit.num_kv_heads, tp, tp_rank, "number of key-value heads", "tp")
    else:
        repeats = divide(tp, unit.num_kv_heads, "tp", "num_key_value_heads")
        first, last = tp_rank // repeats, tp_rank // repeats + 1
    yield cut_dim(unit.key, 0, first * dim, last * dim)
    yield cut_dim(unit.value, 0, first * dim, last * dim)


def _expert_range(num_experts: int, ep: int, ep_rank: int) -> tuple[int, int]:
    base, more = divmod(num_experts, ep)
    first = ep_rank * base + min(ep_rank, more)
    return first, first + base + (ep_rank < more)


def _assign_layers(layers: int, pp: int) -> list[range]:
    """vLLM gives what is left over to the stages before the last, from the back."""
    sizes = [layers // pp] * pp
    for late in range(2, layers % pp + 2):
        sizes[-late] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(pp)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
