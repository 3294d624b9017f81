"""How Megatron-core ranks hold a model: tensor, pipeline, context, expert and data parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.errors import ConfigError
from rdt_core.models.divide import block, divide, round_up
from rdt_core.models.parameter import Parameter, cut_dim, whole
from rdt_core.models.units import Columns, Experts, Heads, Rows, Vocabulary, Whole, specs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.manifest import TensorSpec
    from rdt_core.models.units import Model, Unit
    from rdt_core.region import Region

# Megatron's default for --make-vocab-size-divisible-by; rows are padded to a multiple of it times tp.
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronAxes:
    """Sizes of the parallel axes, in Megatron's own words.

    Args:
        tp, pp, cp, dp: world size is their product.
        ep: expert parallel, inside of a pipeline stage.
        etp: tensor parallel inside of an expert.
        vpp: virtual stages a rank.
        first, last: layers of the first and last stage where they differ from the others; 0 means even.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    first: int = 0
    last: int = 0

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp


class MegatronLayout:
    """The live parameters of every rank, under the default rank order tp-cp-ep-dp-pp.

    Args:
        model: that is trained.
        axes: sizes of the parallel groups.
        vocabulary_multiple: rows of the vocabulary are padded to a multiple of this times tp.

    Source: ``megatron/core/parallel_state.py`` (rank order), ``attention.py`` (linear_qkv holds query
    groups), ``mlp.py`` (linear_fc1 holds gate, then up), ``transformer_block.py`` (layers of a stage).

    Raises:
        ConfigError: a size does not divide.
    """

    side = "trainer"

    def __init__(
        self, model: Model, axes: MegatronAxes, *, vocabulary_multiple: int = VOCABULARY_MULTIPLE
    ) -> None:
        self._model, self._axes, self._vocabulary_multiple = model, axes, vocabulary_multiple
        self.world_size = axes.stage_size * axes.pp
        divide(axes.stage_size, axes.ep * axes.etp, "the number of ranks of a stage", "ep*etp")
        self._stages = _assign_layers(model.config.layers, axes)

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """See :class:`rdt_core.models.parameter.Layout`."""
        axes = self._axes
        stage, place = divmod(rank, axes.stage_size)
        tp_rank = place % axes.tp
        etp_rank, ep_rank = place % axes.etp, place // axes.etp % axes.ep
        if stage == 0:
            yield self._cut_vocabulary(self._model.embedding, tp_rank)
        for layer in self._stages[stage]:
            for unit in self._model.layers[layer]:
                if isinstance(unit, Experts):
                    yield from self._cut_experts(unit, ep_rank, etp_rank)
                else:
                    yield self._cut(unit, tp_rank)
        if stage == axes.pp - 1:
            for unit in self._model.final:
                yield self._cut(unit, tp_rank)
            if self._model.config.is_tied and axes.pp > 1:
                yield self._cut_vocabulary(self._model.embedding, tp_rank)

    def _cut(self, unit: Unit, tp_rank: int) -> Parameter:
        tp = self._axes.tp
        match unit:
            case Vocabulary():
                return self._cut_vocabulary(unit, tp_rank)
            case Whole():
                return Parameter(unit.parameter, whole(specs_of(unit)))
            case Rows():
                return Parameter(
                    unit.parameter,
                    tuple(
                        cut_dim(s, 0, *block(s.shape[0], tp, tp_rank, f"rows of {s.name}", "tp"))
                        for s in unit.specs
                    ),
                )
            case Columns():
                spec = unit.spec
                columns = block(spec.shape[1], tp, tp_rank, f"columns of {spec.name}", "tp")
                return Parameter(spec.name, (cut_dim(spec, 1, *columns),))
            case Heads():
                return Parameter(unit.parameter, tuple(_query_group_rows(unit, tp, tp_rank)))
            case Experts():
                raise TypeError("experts are cut by expert parallel ranks")

    def _cut_vocabulary(self, unit: Vocabulary, tp_rank: int) -> Parameter:
        rows, columns = unit.spec.shape
        padded = round_up(rows, self._vocabulary_multiple * self._axes.tp)
        start, stop = block(padded, self._axes.tp, tp_rank, "padded vocabulary", "tp")
        spec, region = cut_dim(unit.spec, 0, start, stop)
        return Parameter(spec.name, ((spec, region),), padding=(stop - start) * columns - region.num_elements)

    def _cut_experts(self, unit: Experts, ep_rank: int, etp_rank: int) -> Iterator[Parameter]:
        axes, experts = self._axes, unit.by_expert
        first, last = block(len(experts), axes.ep, ep_rank, "number of experts", "ep")
        gate, _, down = experts[first]
        rows = block(gate.shape[0], axes.etp, etp_rank, f"rows of {gate.name}", "etp")
        # One region object serves all experts: they have one shape.
        wide, tall = cut_dim(gate, 0, *rows)[1], cut_dim(down, 1, *rows)[1]
        for index, (gate, up, down) in enumerate(experts[first:last], start=first):
            yield Parameter(f"{unit.parameter}.{index}.linear_fc1.weight", ((gate, wide), (up, wide)))
            yield Parameter(f"{unit.parameter}.{index}.linear_fc2.weight", ((down, tall),))


def _query_group_rows(unit: Heads, tp: int, tp_rank: int) -> Iterator[tuple[TensorSpec, Region]]:
    """Rows of linear_qkv: for every query group its q heads, its k head, its v head; cut as plain rows."""
    dim, groups = unit.head_dim, unit.num_kv_heads
    query_rows = divide(unit.num_heads, groups, "number of heads", "num_key_value_heads") * dim
    start, stop = block((unit.num_heads + 2 * groups) * dim, tp, tp_rank, f"rows of {unit.parameter}", "tp")
    for group in range(groups):
        at = group * (query_rows + 2 * dim)
        for spec, first, size in (
            (unit.query, group * query_rows, query_rows),
            (unit.key, group * dim, dim),
            (unit.value, group * dim, dim),
        ):
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                yield cut_dim(spec, 0, first + low - at, first + high - at)
            at += size


def _assign_layers(layers: int, axes: MegatronAxes) -> list[list[int]]:
    """Global layer numbers of every stage."""
    if axes.first or axes.last:
        return _assign_uneven(layers, axes)
    per_chunk, rest = divmod(layers, axes.pp * axes.vpp)
    if rest:
        raise ConfigError(
            f"{layers} layers do not divide over pp={axes.pp} stages of vpp={axes.vpp}. Give the stages that "
            "differ their number of layers: first=N, last=N."
        )
    return [
        [
            (chunk * axes.pp + stage) * per_chunk + layer
            for chunk in range(axes.vpp)
            for layer in range(per_chunk)
        ]
        for stage in range(axes.pp)
    ]


def _assign_uneven(layers: int, axes: MegatronAxes) -> list[list[int]]:
    given = [size for size in (axes.first, axes.last) if size]
    between, left = axes.pp - len(given), layers - sum(given)
    if axes.vpp > 1 or between < 0 or left < 0 or (left % between if between else left):
        raise ConfigError(
            f"{layers} layers cannot be split over pp={axes.pp} with first={axes.first}, last={axes.last}: "
            f"{left} layers are left for {between} stages. The stages between must get equally many, and "
            "vpp must be 1."
        )
    sizes = [left // between if between else 0] * between
    sizes = [axes.first] * bool(axes.first) + sizes + [axes.last] * bool(axes.last)
    ends = [sum(sizes[: stage + 1]) for stage in range(axes.pp)]
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
