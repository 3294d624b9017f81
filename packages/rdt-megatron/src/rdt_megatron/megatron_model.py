"""The parameters of Megatron-core model chunks: their names over the whole model, and their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron.compat import is_persistent
from rdt_megatron.geometry import Axis, Coordinate

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAYERS = "decoder.layers."


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or persistent buffer of this rank, and the module attribute that it is looked up by.

    Args:
        name: in the bare model, with the layer counted over the whole model, from 0.
        module: owns it.
        attribute: its name there.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> torch.Tensor:
        """What the module holds now."""
        found: torch.Tensor = getattr(self.module, self.attribute)
        return found


def unwrap(chunk: nn.Module) -> nn.Module:
    """The bare model inside of DistributedDataParallel and Float16Module."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def wrappers_of(chunk: nn.Module) -> Iterator[nn.Module]:
    """The wrappers around a bare model, the outermost first."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        yield chunk
        chunk = inner


def coordinate_of(model: Any) -> Coordinate:
    """Where this rank stands in the groups that the model was built with. No collective."""
    groups = model.pg_collection
    return Coordinate(
        tp=_axis(getattr(groups, "tp", None)),
        etp=_axis(getattr(groups, "expt_tp", None)),
        ep=_axis(getattr(groups, "ep", None)),
    )


def _axis(group: Any) -> Axis:
    return Axis() if group is None else Axis(group.rank(), group.size())


def held_by(model: nn.Module) -> Iterator[Held]:
    """Every parameter and persistent buffer of floats of a bare model; shared ones once."""
    numbers = _global_layers(model)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, tensor in _tensors_of(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield Held(_renumber(name, numbers), module, attribute)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for attribute, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and is_persistent(module, attribute):
            yield attribute, buffer


def _global_layers(model: Any) -> dict[str, str]:
    """From a layer's index in this chunk to its index in the whole model, as names hold them."""
    layers = getattr(getattr(model, "decoder", None), "layers", ())
    return {str(index): str(layer.layer_number - 1) for index, layer in enumerate(layers)}


def _renumber(name: str, numbers: dict[str, str]) -> str:
    if not name.startswith(_LAYERS):
        return name
    index, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{numbers[index]}.{rest}"


def check_contiguous(name: str, tensor: torch.Tensor, rank: int) -> None:
    """Refuse a parameter whose memory is not row by row, as the rules take it to be.

    Raises:
        UnsupportedLayoutError: it is not.
    """
    if not tensor.is_contiguous():
        raise UnsupportedLayoutError(
            name,
            rank,
            f"it is not contiguous (strides {tensor.stride()})",
            "Let Megatron allocate it, or make it contiguous before the optimizer is built.",
        )
