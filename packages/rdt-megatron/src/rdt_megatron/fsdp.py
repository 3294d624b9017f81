"""The exporter for PyTorch FSDP2: ``fully_shard``, HSDP, FSDP with tensor parallelism, and plain replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from rdt_core.errors import UnsupportedLayoutError
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_core.region import Region
from rdt_megatron.dtensor_region import NotOneBoxError, held_region
from rdt_megatron.hf_names import UnknownFamilyError, split_parameter
from rdt_megatron.names import strip_wrappers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rdt_megatron.hf_names import Piece

_EXPORTED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter, and the module attribute that it is looked up by.

    Args:
        name: in the bare model.
        tensor: the parameter as it was when described; a DTensor when it is sharded.
        region: what this rank holds of it.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor
    region: Region

    def current(self) -> torch.Tensor:
        """The local tensor that the optimizer writes now.

        While FSDP has the group gathered (the root stays so after an evaluation), the attribute holds a
        passing copy or a shard on a smaller mesh; the parameter that the optimizer knows is the first one.
        """
        found = getattr(self.module, self.attribute)
        return _local(found if _same_layout(found, self.tensor) else self.tensor)


def fsdp_shards(
    model: nn.Module,
    *,
    names: Callable[[str], str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LocalShards:
    """Describe the parameters that this trainer rank holds, where they lie.

    Called in every trainer rank, between steps (not inside a forward or backward), after ``fully_shard``
    and after the model has its final dtype and device. Nothing is gathered, copied or communicated.
    Groups that FSDP has left unsharded are resharded first (``FSDPModule.reshard``), so their next forward
    gathers again, in every rank.

    Under ``MixedPrecisionPolicy`` the shards are the high-precision ones that the optimizer writes. Tied
    parameters appear once, under the name that ``named_parameters`` gives. A parameter that is not sharded
    is exported whole by every rank that holds it; all of them must hold equal values. Buffers are not
    exported.

    Args:
        model: what ``fully_shard`` returned, or any module that holds it; torch.compile, activation
            checkpointing and DistributedDataParallel wrappers are looked through.
        names: from a parameter's name in the bare model to its checkpoint name, where they differ. Fused
            experts of transformers models are named after this, by ``rdt_megatron.hf_names``.
        process_group: all trainer ranks; by default the whole world, or this process alone when
            torch.distributed is not initialised.

    Raises:
        UnsupportedLayoutError: a parameter's memory is not a box of a checkpoint tensor, or not where an
            engine could read it.
    """
    rank, world_size = _place(process_group)
    _reshard(model, rank)
    shards: list[LocalShard] = []
    sources: list[tuple[_Parameter, int]] = []
    with torch.no_grad():
        for parameter in _parameters(model, rank):
            found = list(_shards_of(parameter, names, _model_type(model), rank))
            base = parameter.current().data_ptr()
            shards += found
            sources += [(parameter, shard.data.data_ptr() - base) for shard in found]
    return LocalShards(
        rank=rank, world_size=world_size, shards=tuple(shards), locate=lambda: _locate(sources)
    )


def _place(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _reshard(model: nn.Module, rank: int) -> None:
    """Put every FSDP group's sharded parameters back on its modules. No collective."""
    for prefix, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedLayoutError(
                strip_wrappers(prefix) or "the model",
                rank,
                "FullyShardedDataParallel keeps it in a flat tensor that cuts through rows",
                "Shard the model with torch.distributed.fsdp.fully_shard (FSDP2).",
            )
        if isinstance(module, FSDPModule):
            module.reshard()


def _model_type(model: nn.Module) -> str | None:
    """``config.model_type`` of a transformers model, wrapped or not."""
    for module in model.modules():
        found = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(found, str):
            return found
    return None


def _parameters(model: nn.Module, rank: int) -> Iterator[_Parameter]:
    """Every parameter of which this rank holds an element; tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = strip_wrappers(f"{prefix}.{attribute}" if prefix else attribute)
            region = _region_of(tensor, name, rank)
            if region.num_elements:
                _check_readable(tensor, name, rank)
                yield _Parameter(name, module, attribute, tensor, region)


def _region_of(tensor: torch.Tensor, name: str, rank: int) -> Region:
    if not isinstance(tensor, DTensor):
        return Region.whole(tensor.shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Region((0,) * tensor.dim(), (0,) * tensor.dim())
    try:
        region = held_region(tuple(tensor.shape), mesh.shape, coordinate, tensor.placements)
    except NotOneBoxError as error:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"{error} (placements {tensor.placements})",
            "Choose sizes that the mesh divides evenly, or shard the dims of this parameter differently.",
        ) from error
    local = tuple(_local(tensor).shape)
    if region.num_elements and region.shape != local:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"its local tensor has shape {local}, and placements {tensor.placements} give {region}",
            "Let fully_shard, parallelize_module or distribute_tensor place it.",
        )
    return region


def _check_readable(tensor: torch.Tensor, name: str, rank: int) -> None:
    local = _local(tensor)
    if type(local) not in (torch.Tensor, nn.Parameter) or local.dtype not in _EXPORTED_DTYPES:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"its payload is a {type(local).__name__} of {local.dtype}",
            "Quantized parameters are not exported: train in float16, bfloat16 or float32.",
        )
    if local.is_meta:
        raise UnsupportedLayoutError(
            name,
            rank,
            "it is on the meta device and has no memory",
            "Materialize the model (to_empty and load, or init_weights) before attaching.",
        )
    if isinstance(tensor, DTensor) and local.device.type != tensor.device_mesh.device_type:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"it is offloaded to {local.device} from a mesh of {tensor.device_mesh.device_type}",
            "Call fully_shard without CPUOffloadPolicy.",
        )


def _shards_of(
    parameter: _Parameter, names: Callable[[str], str] | None, model_type: str | None, rank: int
) -> Iterator[LocalShard]:
    """The checkpoint tensors of which this rank's part of a parameter holds something."""
    name = names(parameter.name) if names else parameter.name
    try:
        for piece in split_parameter(name, tuple(parameter.tensor.shape), model_type):
            shard = _shard_of(parameter, piece)
            if shard is not None:
                yield shard
    except UnknownFamilyError as error:
        raise UnsupportedLayoutError(
            parameter.name, rank, str(error), "Add one to rdt_megatron.hf_names.FAMILIES."
        ) from error


def _shard_of(parameter: _Parameter, piece: Piece) -> LocalShard | None:
    held = parameter.region.intersect(piece.region) if parameter.region.start else parameter.region
    if held is None:
        return None
    data = parameter.current().detach()
    for dim, size in enumerate(held.shape):
        data = data.narrow(dim, held.start[dim] - parameter.region.start[dim], size)
    region, shape = _relative(held, piece.region), piece.region.shape
    if piece.drops_leading_dim:
        data, region, shape = data[0], Region(region.start[1:], region.stop[1:]), shape[1:]
    return LocalShard(
        spec=TensorSpec(piece.name, shape, str(data.dtype).removeprefix("torch.")),
        region=region,
        data=data,
        owner=parameter.name,
    )


def _relative(region: Region, origin: Region) -> Region:
    """``region`` in coordinates that begin where ``origin`` does."""
    return Region(
        tuple(a - o for a, o in zip(region.start, origin.start, strict=True)),
        tuple(b - o for b, o in zip(region.stop, origin.start, strict=True)),
    )


def _locate(sources: list[tuple[_Parameter, int]]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(parameter.current().data_ptr() + offset for parameter, offset in sources)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same_layout(found: torch.Tensor, described: torch.Tensor) -> bool:
    if isinstance(found, DTensor) and isinstance(described, DTensor):
        return found.device_mesh == described.device_mesh and found.placements == described.placements
    return isinstance(found, DTensor) == isinstance(described, DTensor)
