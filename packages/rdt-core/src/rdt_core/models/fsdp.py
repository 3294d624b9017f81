"""How FSDP2 ranks hold a transformers model: chunks of dim 0, whole experts where they are fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.models.divide import chunk
from rdt_core.models.parameter import Parameter, cut_dim, whole
from rdt_core.models.units import Experts, specs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.models.units import Model, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpAxes:
    """Sizes of the mesh.

    Args:
        dp: ranks that shard.
        replicate: replicas of that (HSDP).
        dtype: of the shards where it differs from the checkpoint's: ``float32`` for master weights.
    """

    dp: int = 1
    replicate: int = 1
    dtype: str = ""


class FsdpLayout:
    """The live local shards of every rank; HSDP's replicas are equal, the sharding axis is the inner one.

    Source: ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py`` (``torch.chunk`` of dim 0), and
    transformers 5, which holds a layer's experts in two parameters with the expert as dim 0.
    """

    side = "trainer"

    def __init__(self, model: Model, axes: FsdpAxes) -> None:
        self._model, self._axes = model, axes
        self.world_size = axes.dp * axes.replicate

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """See :class:`rdt_core.models.parameter.Layout`."""
        index = rank % self._axes.dp
        units: list[Unit] = [self._model.embedding, *(u for layer in self._model.layers for u in layer)]
        for unit in (*units, *self._model.final):
            if isinstance(unit, Experts):
                yield from self._cut_experts(unit, index)
            else:
                yield from self._cut_rows(unit, index)

    def _cut_rows(self, unit: Unit, index: int) -> Iterator[Parameter]:
        for spec in specs_of(unit):
            part = cut_dim(spec, 0, *chunk(spec.shape[0], self._axes.dp, index))
            if part[1].num_elements:
                yield Parameter(spec.name, (part,), dtype=self._axes.dtype)

    def _cut_experts(self, unit: Experts, index: int) -> Iterator[Parameter]:
        first, last = chunk(len(unit.by_expert), self._axes.dp, index)
        held = unit.by_expert[first:last]
        if held:
            gate_up = whole(spec for gate, up, _ in held for spec in (gate, up))
            yield Parameter(f"{unit.parameter}.gate_up_proj", gate_up, dtype=self._axes.dtype)
            down = whole(spec for _, _, spec in held)
            yield Parameter(f"{unit.parameter}.down_proj", down, dtype=self._axes.dtype)
