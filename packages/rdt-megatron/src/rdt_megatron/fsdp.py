"""The exporter for what PyTorch itself shards: FSDP2 and HSDP, with tensor parallelism, FSDP1, replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rdt_core.collection import paused_collection
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.region import Region
from rdt_megatron.dtensor_region import NotOneBoxError, held_region
from rdt_megatron.fsdp1 import FlatShards
from rdt_megatron.names import strip_wrappers
from rdt_megatron.part import Part, shards_of
from rdt_megatron.peft_names import adapted_modules
from rdt_megatron.places import Places, Slot, local_of
from rdt_megatron.readable import check_readable
from rdt_megatron.world import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch.distributed as dist


class _FsdpSlot(Slot):
    """Finds the local tensor that the optimizer writes."""

    __slots__ = ()

    def __call__(self) -> torch.Tensor:
        """The tensor now.

        While FSDP has the group gathered (the root stays so after an evaluation), the attribute holds a
        passing copy or a shard on a smaller mesh; the parameter that the optimizer knows is the first one.
        """
        found: torch.Tensor | None = self.entries.get(self.attribute)
        if found is None or found is self.tensor:
            return local_of(self.tensor)
        return local_of(found if _same_layout(found, self.tensor) else self.tensor)


def fsdp_shards(
    model: nn.Module,
    *,
    names: Callable[[str], str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LocalShards:
    """Describe the parameters that this trainer rank holds, where they lie.

    Called in every trainer rank, between steps (not inside a forward or backward), after ``fully_shard``,
    ``FullyShardedDataParallel`` or ``DistributedDataParallel`` and after the model has its final dtype and
    device. Nothing is gathered, copied or communicated.
    Groups that FSDP has left unsharded are resharded first (``FSDPModule.reshard``), so their next forward
    gathers again, in every rank.

    Under ``MixedPrecisionPolicy`` the shards are the high-precision ones that the optimizer writes. Tied
    parameters appear once, under the name that ``named_parameters`` gives. A parameter that is not sharded
    is exported whole by every rank that holds it; all of them must hold equal values. Buffers are not
    exported. FSDP1 cuts parameters anywhere; its ranks hold up to three boxes of a matrix.

    Args:
        model: what was sharded, or any module that holds it; torch.compile, activation checkpointing and
            DistributedDataParallel wrappers are looked through.
        names: from a parameter's name in the bare model to its checkpoint name, where they differ. Fused
            experts of transformers models are named after this, by ``rdt_megatron.hf_names``.
        process_group: all trainer ranks; by default the whole world, or this process alone when
            torch.distributed is not initialised.

    Raises:
        UnsupportedLayoutError: a parameter's memory is not a box of a checkpoint tensor, or not where an
            engine could read it; or PEFT has added adapters (see ``merged_shards`` and ``adapter_shards``).
    """
    rank, world_size = rank_and_size(process_group)
    with torch.no_grad(), paused_collection():
        modules = dict(model.named_modules())
        _refuse_adapted(modules, rank)
        reshard(modules)
        return shards_of_parts(
            parts_of(modules, rank), rank, world_size, names=names, model_type=model_type_of(modules)
        )


def shards_of_parts(
    parts: Iterable[Part],
    rank: int,
    world_size: int,
    *,
    names: Callable[[str], str] | None = None,
    model_type: str | None = None,
) -> LocalShards:
    """What an exporter returns, from the boxes that it found. For the arguments see ``fsdp_shards``."""
    shards: list[LocalShard] = []
    sources: list[tuple[Callable[[], torch.Tensor], int]] = []
    for part in parts:
        data = part.find().detach()
        found = shards_of(part, data, names, model_type, rank)
        base = data.data_ptr()
        shards += found
        sources += [(part.find, shard.data.data_ptr() - base) for shard in found]
    return LocalShards(rank=rank, world_size=world_size, shards=tuple(shards), locate=Places(sources))


def _refuse_adapted(modules: Mapping[str, nn.Module], rank: int) -> None:
    name, module = next(adapted_modules(modules), (None, None))
    if name is not None:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"it is a {type(module).__name__} of PEFT, and the sum of base weight and adapter that an engine "
            "would load lies nowhere in memory",
            "Use merged_shards(model), which keeps a merged copy of every adapted weight, or "
            "adapter_shards(model) for the adapter alone.",
        )


def reshard(modules: Mapping[str, nn.Module]) -> None:
    """Put every FSDP2 group's sharded parameters back on its modules. No collective."""
    for module in modules.values():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_type_of(modules: Mapping[str, nn.Module]) -> str | None:
    """``config.model_type`` of a transformers model, wrapped or not."""
    for module in modules.values():
        found = getattr(vars(module).get("config"), "model_type", None)
        if isinstance(found, str):
            return found
    return None


def parts_of(modules: Mapping[str, nn.Module], rank: int) -> Iterator[Part]:
    """Every box that this rank holds of a parameter of these modules, by name; tied parameters once."""
    flat = FlatShards(modules, rank)
    for part in flat.parts():
        check_readable(part.find(), part.name, rank)
        yield part
    seen: set[int] = set()
    for prefix, module in modules.items():
        for attribute, tensor in module._parameters.items():  # noqa: SLF001  named_parameters takes 10 times longer
            if tensor is None or id(tensor) in seen or flat.owns(module, attribute, tensor):
                continue
            seen.add(id(tensor))
            name = strip_wrappers(f"{prefix}.{attribute}" if prefix else attribute)
            shape = tuple(tensor.shape)
            region = _region_of(tensor, shape, name, rank)
            if region.num_elements:
                _check_place(tensor, name, rank)
                check_readable(local_of(tensor), name, rank)
                yield Part(name, shape, region, _FsdpSlot(module, attribute, tensor))


def _region_of(tensor: torch.Tensor, shape: tuple[int, ...], name: str, rank: int) -> Region:
    if not isinstance(tensor, DTensor):
        return Region.whole(shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Region((0,) * tensor.dim(), (0,) * tensor.dim())
    try:
        region = held_region(shape, mesh.shape, coordinate, tensor.placements)
    except NotOneBoxError as error:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"{error} (placements {tensor.placements})",
            "Choose sizes that the mesh divides evenly, or shard the dims of this parameter differently.",
        ) from error
    local = tuple(local_of(tensor).shape)
    if region.num_elements and region.shape != local:
        raise UnsupportedLayoutError(
            name,
            rank,
            f"its local tensor has shape {local}, and placements {tensor.placements} give {region}",
            "Let fully_shard, parallelize_module or distribute_tensor place it.",
        )
    return region


def _check_place(tensor: torch.Tensor, name: str, rank: int) -> None:
    if isinstance(tensor, DTensor) and not tensor.is_meta:
        local = local_of(tensor)
        if local.device.type not in (tensor.device_mesh.device_type, "meta"):
            raise UnsupportedLayoutError(
                name,
                rank,
                f"it is offloaded to {local.device} from a mesh of {tensor.device_mesh.device_type}",
                "Call fully_shard without CPUOffloadPolicy.",
            )


def _same_layout(found: torch.Tensor, described: torch.Tensor) -> bool:
    if isinstance(found, DTensor) and isinstance(described, DTensor):
        return found.device_mesh == described.device_mesh and found.placements == described.placements
    return isinstance(found, DTensor) == isinstance(described, DTensor)
