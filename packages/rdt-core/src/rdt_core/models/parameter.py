"""One parameter of a rank: regions of checkpoint tensors that follow each other in one storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import row_major_strides
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Parameter:
    """A storage that holds regions row-major, one behind the other.

    Args:
        name: of the window.
        parts: each tensor and what of it is held; an empty region holds nothing.
        padding: elements behind the last part.
        dtype: element type in memory, empty for each tensor's own.
    """

    name: str
    parts: tuple[tuple[TensorSpec, Region], ...]
    padding: int = 0
    dtype: str = ""


class Layout(Protocol):
    """How one side's ranks hold a model."""

    @property
    def side(self) -> str:
        """``"trainer"`` or ``"engine"``."""

    @property
    def world_size(self) -> int:
        """Ranks of the trainer, or of one engine."""

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """What a rank holds, in the order of the model."""


def build_manifest(layout: Layout, rank: int, node: str) -> Manifest:
    """The manifest that this rank would give, linear in what it holds. ``device`` is ``"cuda"``."""
    windows: dict[str, Window] = {}
    tensors: dict[str, TensorSpec] = {}
    shards: list[Shard] = []
    for parameter in layout.parameters(rank):
        nbytes = _append_shards(parameter, shards, tensors)
        windows[parameter.name] = Window(parameter.name, nbytes)
    return Manifest(
        side=layout.side,
        rank=rank,
        world_size=layout.world_size,
        node=node,
        device="cuda",
        windows=windows,
        tensors=tensors,
        shards=tuple(shards),
    )


def _append_shards(parameter: Parameter, shards: list[Shard], tensors: dict[str, TensorSpec]) -> int:
    end = 0
    itemsize = itemsize_bytes(parameter.dtype) if parameter.dtype else 1
    for spec, region in parameter.parts:
        dtype = parameter.dtype or spec.dtype
        itemsize = itemsize_bytes(dtype)
        shape = region.shape
        tensors[spec.name] = spec
        shards.append(
            Shard(
                tensor=spec.name,
                region=region,
                window=parameter.name,
                offset_bytes=end,
                stride_bytes=row_major_strides(shape, itemsize),
                dtype=dtype,
            )
        )
        end += region.num_elements * itemsize
    return end + parameter.padding * itemsize


def whole(specs: Iterable[TensorSpec]) -> tuple[tuple[TensorSpec, Region], ...]:
    """Parts that hold tensors in full."""
    return tuple((spec, Region.whole(spec.shape)) for spec in specs)


def cut_dim(spec: TensorSpec, dim: int, start: int, stop: int) -> tuple[TensorSpec, Region]:
    """A part that holds ``[start, stop)`` of one dim, clipped to the tensor, and the others in full."""
    size = spec.shape[dim]
    bounds = [(0, n) for n in spec.shape]
    bounds[dim] = (min(start, size), min(stop, size))
    return spec, Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))
