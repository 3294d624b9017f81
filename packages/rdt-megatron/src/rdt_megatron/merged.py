"""The exporter for a LoRA model as engines without adapters load it: base weights with the adapter added."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron.fsdp import model_type_of, parts_of, reshard, shards_of_parts
from rdt_megatron.peft_names import AdapterNames, adapted_modules
from rdt_megatron.world import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch.distributed as dist
    from torch import nn

    from rdt_core.local_shards import LocalShards
    from rdt_megatron.part import Part


@dataclass(frozen=True, slots=True)
class _Adapted:
    """One adapted weight and the copy that engines read.

    Args:
        name: of the weight in the model as PEFT left it.
        layer: PEFT's LoRA layer.
        copy: this rank's part of base weight plus adapter; None where the rank has no part of it.
    """

    name: str
    layer: Any
    copy: torch.Tensor | None

    def refresh(self, adapter: str, rank: int) -> None:
        """Add up anew. With FSDP2 a collective, since a rank has only rows of both factors."""
        _refuse_merged(self, rank)
        weight = self.layer.base_layer.weight
        delta = self.layer.get_delta_weight(adapter)
        if isinstance(weight, DTensor):
            delta = delta.redistribute(weight.device_mesh, weight.placements).to_local()
            weight = weight.to_local()
        if self.copy is not None:
            self.copy.copy_(weight).add_(delta)


def merged_shards(
    model: nn.Module,
    *,
    adapter: str = "default",
    names: Callable[[str], str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LocalShards:
    """Describe what this trainer rank holds of the base model with one LoRA adapter merged into it.

    Called in every trainer rank, as :func:`rdt_megatron.fsdp_shards` is. An adapted weight is exported from a
    copy of this rank's part of it, which ``publish`` fills anew; the rest, ``modules_to_save`` in place of
    what they replace included, is exported where it lies. The copies take as much memory as the adapted
    weights and count in ``arena_bytes``. The model itself is not merged: training goes on with its weights.

    With FSDP2 filling is a collective, so every rank must publish, in one order with its other collectives.

    Args:
        model: a ``PeftModel``, wrapped in FSDP2 or DDP, or not.
        adapter: its name in the model.
        names: from a parameter's name in the base model to its checkpoint name, where they differ.
        process_group: all trainer ranks; by default the whole world.

    Raises:
        UnsupportedLayoutError: there is no such adapter; it adds more than a product of two matrices (DoRA,
            bias); FSDP1 has flattened it; or memory cannot be described (see ``fsdp_shards``).
    """
    rank, world_size = rank_and_size(process_group)
    modules = dict(model.named_modules())
    reshard(modules)
    known = AdapterNames(modules, adapter, rank)
    layers = dict(_adapted_layers(modules, adapter, rank))
    with torch.no_grad():
        held = {part.name: part for part in parts_of(modules, rank)}
        adapted = [_Adapted(name, layer, _copy_of(held.get(name))) for name, layer in layers.items()]
        copies = {one.name: one.copy for one in adapted if one.copy is not None}
        parts = [_part_of(part, name, copies) for part, name in _renamed(held.values(), known)]
        local = shards_of_parts(parts, rank, world_size, names=names, model_type=model_type_of(modules))
    return dataclasses.replace(
        local,
        refresh=functools.partial(_refresh, modules, adapted, adapter, rank),
        copied_bytes=sum(copy.numel() * copy.element_size() for copy in copies.values()),
    )


def _refresh(modules: Mapping[str, nn.Module], adapted: Sequence[_Adapted], adapter: str, rank: int) -> None:
    reshard(modules)
    with torch.no_grad():
        for one in adapted:
            one.refresh(adapter, rank)


def _renamed(parts: Iterable[Part], known: AdapterNames) -> Iterator[tuple[Part, str]]:
    for part in parts:
        name = known.in_merged_model(part.name)
        if name is not None:
            yield part, name


def _part_of(part: Part, name: str, copies: Mapping[str, torch.Tensor]) -> Part:
    copy = copies.get(part.name)
    return dataclasses.replace(part, name=name, find=part.find if copy is None else lambda: copy)


def _copy_of(part: Part | None) -> torch.Tensor | None:
    return None if part is None else torch.empty_like(part.find(), memory_format=torch.contiguous_format)


def _adapted_layers(modules: Mapping[str, nn.Module], adapter: str, rank: int) -> Iterator[tuple[str, Any]]:
    """The layers that the adapter changes, by the name of the weight that it changes there."""
    for name, layer in adapted_modules(modules):
        if any(adapter in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A")):
            reason = _objection(modules, layer, adapter)
            if reason is not None:
                raise UnsupportedLayoutError(
                    name, rank, reason, "Use adapter_shards(model) for the adapter alone."
                )
            yield f"{name}.base_layer.weight", layer


def _objection(modules: Mapping[str, nn.Module], layer: Any, adapter: str) -> str | None:
    """Why the sum is not base weight plus product, in words; None when it is."""
    if any(isinstance(module, FullyShardedDataParallel) for module in modules.values()):
        return "FullyShardedDataParallel cuts its factors anywhere, so that no rank can multiply them"
    if adapter in layer.lora_variant:
        return f"the adapter is a {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias.get(adapter):
        return "the adapter has a bias"
    if getattr(layer, "parameter_name", "weight") != "weight" or not hasattr(layer.base_layer, "weight"):
        return f"it adapts another parameter than the weight of a {type(layer.base_layer).__name__}"
    return None


def _refuse_merged(adapted: _Adapted, rank: int) -> None:
    if adapted.layer.merged_adapters:
        raise UnsupportedLayoutError(
            adapted.name,
            rank,
            f"PEFT has merged {', '.join(adapted.layer.merged_adapters)} into it",
            "Call unmerge_adapter() on the model before publish.",
        )
