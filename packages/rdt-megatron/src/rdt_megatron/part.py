"""One box of a trainer's parameter, and how to find its memory again at every publish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.describe import dtype_name
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.local_shards import LocalShard
from rdt_core.manifest import TensorSpec
from rdt_core.region import Region
from rdt_megatron.hf_names import UnknownFamilyError, name_unfused, split_fused

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rdt_megatron.hf_names import Piece


@dataclass(frozen=True, slots=True)
class Part:
    """A box that this rank holds of one parameter.

    Args:
        name: of the parameter in the bare model.
        shape: its GLOBAL shape, in elements.
        region: the box, not empty.
        find: the memory that the optimizer writes now, of shape ``region.shape``. Takes no collective.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    find: Callable[[], torch.Tensor]


def shards_of(
    part: Part,
    data: torch.Tensor,
    names: Callable[[str], str] | None,
    model_type: str | None,
    rank: int,
) -> list[LocalShard]:
    """The checkpoint tensors of which a part holds something.

    Args:
        part: what this rank holds.
        data: its memory, found and detached.
        names: from a parameter's name to its checkpoint name, where they differ.
        model_type: ``config.model_type`` of a transformers model, which says how fused parameters are saved.
        rank: global trainer rank, for errors.

    Raises:
        UnsupportedLayoutError: a fused parameter of a model type without a rule.
    """
    name = names(part.name) if names else part.name
    try:
        whole = name_unfused(name, model_type)
    except UnknownFamilyError as error:
        raise UnsupportedLayoutError(
            part.name, rank, str(error), "Add one to rdt_megatron.hf_names.FAMILIES."
        ) from error
    if whole is not None:
        spec = TensorSpec(whole, part.shape, dtype_name(data.dtype))
        return [LocalShard(spec=spec, region=part.region, data=data, owner=part.name)]
    pieces = split_fused(name, part.shape, model_type)
    return [shard for piece in pieces if (shard := _shard_of(part, data, piece)) is not None]


def _shard_of(part: Part, data: torch.Tensor, piece: Piece) -> LocalShard | None:
    held = part.region.intersect(piece.region)
    if held is None:
        return None
    if held != part.region:
        for dim, size in enumerate(held.shape):
            data = data.narrow(dim, held.start[dim] - part.region.start[dim], size)
    region = _relative(held, piece.region)
    return LocalShard(
        spec=TensorSpec(piece.name, piece.region.shape[1:], dtype_name(data.dtype)),
        region=Region(region.start[1:], region.stop[1:]),
        data=data[0],
        owner=part.name,
    )


def _relative(region: Region, origin: Region) -> Region:
    """``region`` in coordinates that begin where ``origin`` does."""
    return Region(
        tuple(a - o for a, o in zip(region.start, origin.start, strict=True)),
        tuple(b - o for b, o in zip(region.stop, origin.start, strict=True)),
    )
