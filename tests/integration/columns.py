"""An engine of row-parallel layers only: every rank holds a column block of each matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from rdt_core.recorder import record_loader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording


class Columns(nn.Module):
    """One rank of an engine with row-parallel layers: a column block of every matrix, all of every vector."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.held = nn.ParameterDict()
        self._columns: dict[str, tuple[int, int]] = {}
        for name, shape in shapes.items():
            width = shape[-1] // world_size if len(shape) > 1 else shape[-1]
            self._columns[name] = (rank * width if len(shape) > 1 else 0, width)
            data = torch.zeros((*shape[:-1], width), dtype=dtype)
            self.held[name.replace(".", "_")] = nn.Parameter(data, requires_grad=False)

    def parameter(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.held[name.replace(".", "_")]
        return found

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.parameter(name).data.copy_(self.part(name, tensor))

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank takes of a whole tensor."""
        return tensor.narrow(-1, *self._columns[name])


class EngineRank:
    """See :class:`rdt_core.engine_model.EngineModel`."""

    device = torch.device("cpu")
    is_asleep = False

    def __init__(self, model: Columns, rank: int, world_size: int) -> None:
        self.model, self.rank, self.world_size = model, rank, world_size

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        return record_loader(self.model, specs)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_weights(tensors)

    def finalize(self) -> None:
        """Nothing is derived from these weights."""
